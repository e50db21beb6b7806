"""Types of values on the command line, beside those of click."""
import os

import click


class FileName(click.Path):
    """The type of options that name a file or a folder.

    An empty name, such as that of a variable that is not set, would be the current folder, or nothing.
    """

    def convert(self, value, param, ctx):
        """Click's: the name."""
        if value == "":
            self.fail("the name is empty, expected that of a file or a folder.", param, ctx)
        if "\0" in os.fsdecode(value):
            self.fail("a file whose name has a null character cannot be read or written.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number of a range, in which click would leave NaN."""

    def convert(self, value, param, ctx):
        """Click's: the number."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number.", param, ctx)
        return number
