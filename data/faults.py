"""faults.py: what becomes of a document that cannot be read (--on-error): the end of the run, or a count of such and the
place of the first one.
"""
from errors import DataError


class Fault(Exception):
    """Something that cannot be read; what and detail as in Faults.met(), place: where in the file, for instance ':12'."""

    def __init__(self, what, detail="", place=""):
        super().__init__(what + detail)
        self.what, self.detail, self.place = what, detail, place


class Faults:
    """Collects faults where skip is true; the first one ends the run where it is not."""

    def __init__(self, skip=False):
        self.skip = skip
        self._met = {}  # (what, unit): [count, the first one's place]

    def met(self, unit, what, place, detail=""):
        """unit: 'line', 'row', 'document' or 'file', the thing that is lost. what: the kind of fault, the same words for
        each of its kind; detail: the rest of the message. place: a function that makes the text 'FILE:LINE'."""
        if not self.skip:
            raise DataError(f"{place()}: {what}{detail}; --on-error skip passes over it")
        seen = self._met.setdefault((what, unit), [0, None])
        seen[0] += 1
        seen[1] = seen[1] or place()

    def summary(self):
        """A line per kind of fault."""
        return [f"skipped {count:,} {unit}{'s' * (count != 1)}: {what}; the first is {place}"
                for (what, unit), (count, place) in self._met.items()]
