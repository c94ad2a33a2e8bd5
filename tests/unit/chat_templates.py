"""Chat templates in four styles, each as models ship it and with the assistant's words marked by hand."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "OPEN{{ message['content'] + '<|im_end|>' }}CLOSE{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "OPEN{{ message['content'] | trim + '<|eot_id|>' }}CLOSE{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "OPEN{{ ' ' + message['content'] + eos_token }}CLOSE{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' }}OPEN{{ message['content'] + eos_token }}CLOSE{{ '\n' }}{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR}

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
"""`[INST]`, `<|user|>` and their like are plain text in the models that use them."""


def plain(style: str) -> str:
    return STYLES[style].replace("OPEN", "").replace("CLOSE", "")


def marked(style: str) -> str:
    """The words of the assistant between `generation` tags; a turn of another role is not marked."""
    template = STYLES[style]
    if style in ("chatml", "llama3"):
        before, rest = template.split("OPEN")
        body, after = rest.split("CLOSE")
        choice = (
            "{% if message['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}{% else %}" + body
        )
        return before + choice + "{% endif %}" + after
    return template.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
