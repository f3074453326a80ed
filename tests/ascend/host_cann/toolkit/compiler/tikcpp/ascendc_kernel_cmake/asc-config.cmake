# What find_package(ASC) reads: it tells CMake of a language ASC, as CANN's own does.
list(APPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}/asc_modules")
