"""A task of one's own: say a number that stood in the context."""

from random import Random

import kvcomp
from kvcomp.lab import Sample, Task
from kvcomp.lab.tasks import Span

NAMES = ("Ada", "Bo", "Cy", "Dee", "Eli", "Flo")


class PhoneBook(Task):
    """Say the four digits that the context gave to a name."""

    name = "own/phonebook"

    def sample(self, split: str, index: int) -> Sample:
        random = Random(f"{self.name} {split} {index}")
        numbers = [" ".join(random.choices("0123456789", k=4)) for _ in NAMES]
        asked = random.randrange(len(NAMES))
        return Sample(
            context=tuple(f"The number of {name} is {number}." for name, number in zip(NAMES, numbers, strict=True)),
            question=f"Say the name {NAMES[asked]}, then the number.",
            answer=f"{NAMES[asked]} {numbers[asked]}",
            evidence=(Span(asked),),
            slots=(1, 2, 3, 4),
        )


@kvcomp.hookimpl
def kvcomp_tasks():
    return [PhoneBook()]
