// The part of torch's header of this name that DeepSpeed's asynchronous files use: tensors, and Python's view of them.
// torch's own has all layers, optimizers and data loaders of its C++ interface, too, and takes most of a build.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>

namespace py = pybind11;
