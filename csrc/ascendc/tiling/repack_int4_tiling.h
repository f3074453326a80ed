// What the host tells the kernels of repack_int4: plain words that they read as they are.

#pragma once

#include <cstdint>

namespace moe_fx::ascendc {

// How checkpoints lay out an expert's unsigned nibbles, K inputs by N outputs, as lowering/triton/repack.py names them.
enum class Int4Layout : uint32_t {
  kAwq,                // int32 [K, N/8]; the nibble at bit 4i is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
  kGptq,               // int32 [K/8, N]; the nibble at bit 4i is input 8r + i
  kCompressedTensors,  // int32 [N, K/8], nibbles as in kGptq; bytes of the canonical uint8 [N, K/2]
};

// One weight of each expert; gate and up are two of them that share their rows of the result.
struct RepackInt4Tiling {
  uint32_t experts;
  uint32_t rows;         // of an expert: its inputs; of zero points, its groups
  uint32_t columns;      // outputs
  uint32_t firstColumn;  // of the result's rows
  uint32_t rowColumns;   // of a whole row of the result
  uint32_t tileRows;     // rows and columns that are computed at a time
  uint32_t tileColumns;
  uint32_t less;  // by how much zero points are smaller than meant (GPTQ's first version: 1)
};

}  // namespace moe_fx::ascendc
