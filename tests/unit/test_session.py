"""What workers on other machines are told."""

from __future__ import annotations

from ftray.session import worker_environment


def test_no_secret_reaches_rays_logs():
    environment = {
        "HF_HOME": "/cache",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_TOKEN": "hf_secret",
        "FTRAY_DATA": "/data",
        "FTRAY_API_KEY": "secret",
        "NCCL_SOCKET_IFNAME": "eth1",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    passed = worker_environment(environment, verbose=False)
    assert not [value for value in passed.values() if "secret" in value]
    assert {"HF_HOME", "FTRAY_DATA", "NCCL_SOCKET_IFNAME"} <= passed.keys()
