def answer_help(argv, options_type, prog, description):
    pass
