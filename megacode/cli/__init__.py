"""The command line: `main` finds the verb, and each verb has a file: arguments, a call, what a person sees."""
