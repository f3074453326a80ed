// The header that a kernel includes: under CANN its own answers, under a host compiler this one, which is the model of
// the subset of Ascend C for arch 2201 that this project's kernels use.

#pragma once

#include "model/cast.h"
#include "model/compare.h"
#include "model/data_copy.h"
#include "model/elementwise.h"
#include "model/enums.h"
#include "model/fill.h"
#include "model/gather.h"
#include "model/launch.h"
#include "model/macros.h"
#include "model/pipe.h"
#include "model/reduce.h"
#include "model/roofline.h"
#include "model/sort.h"
#include "model/sync.h"
#include "model/tensor.h"
#include "model/transpose.h"
#include "model/types.h"
#include "model/vector.h"
