// The loss family, one pair or one completion at a time: values and derivatives as plain fp64
// scalar functions for host and device. docs/losses.md lists the formulas.
#pragma once

#include "core/loss_pair.h"      // IWYU pragma: export
#include "core/loss_unpaired.h"  // IWYU pragma: export
