// Which instruction set's kernels run: the best that the processor has, or the one that ORPO_KERNELS_ISA names.

#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace orpo {

// The kernels that this processor can run, the best first.
std::vector<const Kernels*> supported_kernels();

// The first of them, or the one of that name. Throws std::invalid_argument, naming both sides, where there is none.
const Kernels& select_kernels(const std::string& isa);

}  // namespace orpo
