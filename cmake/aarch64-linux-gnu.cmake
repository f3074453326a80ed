# Cross-compiles for 64-bit Arm Linux with Debian's g++-aarch64-linux-gnu. Programs then run under QEMU with Debian's
# Arm libraries: qemu-aarch64-static -L /usr/aarch64-linux-gnu PROGRAM (see `make test-arm`).

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
