"""The commands of `alexnet`, by what they work on. Thin: each checks its words and calls the module that does the work.
"""
