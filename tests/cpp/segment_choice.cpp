// The segments that SegmentChoice picks: of each line of stdin, its members and `forced`, one line.
#include <iostream>

#include "gated_delta/chunk_segments.h"

int main() {
  df::SegmentChoice c;
  bool forced;
  while (std::cin >> c.chains >> c.chunks >> c.tiles >> c.tiles_of_k >> c.sms >> c.most_parts >>
         forced)
    std::cout << c.segment(forced) << '\n';
}
