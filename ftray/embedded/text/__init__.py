"""The grammars that write the embedded base's pretraining text: words → sentences → stories → tasks."""
