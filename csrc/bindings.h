// The parts of the Python face that have a file of their own; bindings.cpp calls each once.

#pragma once

#include <pybind11/pybind11.h>

void bind_engine(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
