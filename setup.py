"""What pyproject.toml cannot say: `kernels/` is installed as `fastsds.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastsds*"]), "fastsds.kernels"],
    package_dir={"fastsds.kernels": "kernels"},
)
