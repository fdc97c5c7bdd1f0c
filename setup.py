"""Builds csrc/ with pybind11 (C++17, OpenMP, no torch headers) and puts configs/ into the wheel.

Without a compiler thinkmid is complete: the Python twins of csrc/ do its work.
"""

import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py


class BuildIfPossible(build_ext):
    def run(self):
        try:
            super().run()
        except Exception as error:  # any compiler trouble: the package is complete without its extension
            print(
                f"thinkmid: csrc was not built ({type(error).__name__}: {error}). Packing and kernels run in "
                "Python, slower; install a C++17 compiler and reinstall to change that.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        # an editable install copies what was built; after a failure there is nothing to copy
        for ext in self.extensions:
            try:
                super().copy_extensions_to_source()
            except (FileNotFoundError, OSError):
                print(f"thinkmid: {ext.name} was not built, there is nothing to copy", file=sys.stderr)
            return


class BuildWithConfigs(build_py):
    """configs/*.toml become thinkmid/configs/ of a wheel. An editable install and a checkout read configs/ itself."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "thinkmid", "configs")
            folder.mkdir(parents=True, exist_ok=True)
            for path in glob("configs/*.toml"):
                shutil.copy(path, folder)


ParallelCompile().install()  # one compiler per core

setup(
    ext_modules=[
        Pybind11Extension(
            "thinkmid._csrc",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp") + glob("csrc/*.inl")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildIfPossible, "build_py": BuildWithConfigs},
)
