"""The base of every error whose message is meant for a reader."""


class CourseError(Exception):
    """One sentence that says what is wrong and what to do; the command line prints it without a traceback."""
