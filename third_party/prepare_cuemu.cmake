# cmake -DFROM=<cuemu> -DTO=<folder> -P: the emulator's sources, with one correction. Its registers
# are packed by live ranges, and a value that is set inside of a backward branch and used behind it
# is live all the way from the branch's target: without that, code in between overwrites it (wrong
# numbers, no error). A copy of cuemu that no longer has the lines below is taken as it is.
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
file(WRITE ${TO}/parse.cpp "${text}")
