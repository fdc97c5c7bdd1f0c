"""Builds csrc/ with pybind11: C++17, OpenMP, no torch headers. Without a compiler the Python twins do its work."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup


class BuildOrSaySo(build_ext):
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
                print(f"thinkmid: {ext.name} is not there to copy", file=sys.stderr)
            return


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
    cmdclass={"build_ext": BuildOrSaySo},
    package_data={
        "thinkmid.mini": ["wordings.toml"],
        "thinkmid.report": ["page.css", "page.js", "paper.toml", "templates/*.html"],
        "thinkmid.run": ["curves.mplstyle"],
        "thinkmid.rollout.judge": ["*.toml"],
        "thinkmid.rollout.grade": ["*.toml"],
    },
)
