"""The project's own fuzzer: no bad input may end in a traceback, a hang, a leak or a half-written file.

It has two halves, which ask for the same thing of different readers of files.

    bad_inputs/    a table of mistakes, by kind: what a user mistypes and what a stranger's file may hold
    runner.py      each of them drives a script in a process of its own: exit code 2, one line, nothing left
    judge.py       what is wrong with how such a process ended
    mutations.py   good files, changed at random but by their structure
    readers.py     each of them goes through the readers: a value, or a UserError of one line

    explorer.py    tries the changed files on the readers, and keeps those that fail
    case.py        an entry of the table
    edits.py       the changes that the entries make to files
    place.py       the good files that they start from
    __main__.py    `make fuzz`: both halves for as long as you like, and a table of figures
    test_fuzz.py   the same in the suite, in under a minute
    mutants.py     `make mutants`: faults in the modules that guard; are there tests that notice?

A message is judged by its form here, and by one word that it must contain. Whether it helps is for the tests
of each module.
"""
