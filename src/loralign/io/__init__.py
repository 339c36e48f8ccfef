"""Export, verify and resume: plain PEFT adapters, proven in a clean process."""
