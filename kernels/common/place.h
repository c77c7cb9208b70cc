// Where an element of a (B, C, pixels) map lies, and which piece of it a block works on.
#pragma once

#include "common/portable.h"

namespace sivae {

struct Shape {
  int64_t batch, channels, space;

  // Pixel p of channel c of sample b, space innermost; and with the channels innermost.
  SIVAE_HD int64_t in_plane(int64_t b, int64_t c, int64_t p) const { return (b * channels + c) * space + p; }
  SIVAE_HD int64_t in_last(int64_t b, int64_t c, int64_t p) const { return (b * space + p) * channels + c; }
};

// Pieces of work in the order in which blocks take them, the innermost first: `inner` of one kind, `middle`, samples.
struct Unit {
  int64_t inner, middle, sample;
};

SIVAE_HD Unit unit_of(int64_t index, int64_t inner, int64_t middle) {
  return {index % inner, index / inner % middle, index / inner / middle};
}

}  // namespace sivae
