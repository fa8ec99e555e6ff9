# cmake -DFROM=<cuemu> -DTO=<folder> -P: the emulator's sources, with two corrections. Its registers
# are packed by live ranges. (1) A value that is set inside of a backward branch and used behind it
# is live all the way from the branch's target. (2) A predicate is one word with a bit a lane, other
# registers have a word a lane: where lanes of a warp are at different places, the two kinds must not
# share a slot. Without that, code in between overwrites a register (wrong numbers, no error). A copy
# of cuemu that no longer has the lines below is taken as it is.
file(COPY ${FROM}/ DESTINATION ${TO} NO_SOURCE_PERMISSIONS FILES_MATCHING
     PATTERN "*.cpp" PATTERN "*.h" PATTERN "*.sh" PATTERN "tests" EXCLUDE PATTERN "example" EXCLUDE)
file(READ ${TO}/parse.cpp text)
set(found [[
          if (first[r] < head && last[r] < tail) {
            last[r] = tail;
            changed = true;
          }
]])
set(added [[
          if (head < first[r] && first[r] <= tail && tail < last[r]) {
            first[r] = head;
            changed = true;
          }
]])
string(REPLACE "${found}" "${found}${added}" text "${text}")
set(pools [[
    std::vector<u32> free_slots;
    std::multimap<u32, u32> active;  // end of the live range -> slot
    for (u32 r : order) {
]])
set(by_kind [[
    std::vector<bool> is_mask(n, false);
    auto mark = [&](auto& self, std::vector<Opnd>& v) -> void {
      for (auto& o : v) {
        if (o.k == Opnd::reg && o.decl == Ty::pred) is_mask[o.slot] = true;
        self(self, o.v);
      }
    };
    for (auto& in : k->code) {
      mark(mark, in.o);
      if (in.guard >= 0) is_mask[in.guard] = true;
    }
    for (int kind = 0; kind < 2; kind++) {
    std::vector<u32> free_slots;
    std::multimap<u32, u32> active;
    for (u32 r : order) {
      if (is_mask[r] != (kind == 1)) continue;
]])
set(end_of_pools [[
      active.insert({last[r], slot[r]});
    }
]])
string(FIND "${text}" "${pools}" at)
if(NOT at EQUAL -1)
  string(REPLACE "${pools}" "${by_kind}" text "${text}")
  string(REPLACE "${end_of_pools}" "${end_of_pools}    }\n" text "${text}")
endif()
file(WRITE ${TO}/parse.cpp "${text}")
