"""Commands as Ray jobs on a cluster: what travels with them, what they end as, and which runs there are. No torch; Ray
is imported when a cluster is asked."""
