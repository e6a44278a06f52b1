"""The oldest versions that the metadata allows, as pip takes them: ``numpy==2.0 pydantic==2.10``.

Of the core and of the extras that are named as arguments. torch is left out: only its newest
versions can be had without a GPU's libraries.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = [*project["dependencies"]]
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
for requirement in map(Requirement, wanted):
    ((operator, version),) = [(each.operator, each.version) for each in requirement.specifier]
    assert operator == ">=", requirement
    if requirement.name != "torch":
        print(f"{requirement.name}=={version}")
