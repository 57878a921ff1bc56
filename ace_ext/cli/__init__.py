"""The command line: one file per verb, shared arguments in ``args``. May import everything; nothing imports it."""
