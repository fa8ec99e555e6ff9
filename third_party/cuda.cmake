# The CUDA half of the build: included when `cuda` is "native" or "emulated".
#   native    objects df_cuda (every architecture) and df_sm90a (*_sm90.cu), linked into libdeltafuse
#   emulated  one test library per architecture, build/emulated/libdeltafuse_emulated_<arch>.so, with
#             the same kernels as PTX, registered for CPU tensors, on the emulator's CUDA runtime
# Launchers in *_sm90.cu files are declared weak: null where these files are not part of the build.
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
find_package(Python COMPONENTS Interpreter)
list(APPEND CMAKE_MODULE_PATH ${root}/third_party)
find_package(CUTLASS 4.2)
if(NOT CUTLASS_FOUND)
  message(STATUS "deltafuse: no CUTLASS headers; kernels that need them are left out (none so far)")
endif()

function(deltafuse_cuda_objects name archs)
  add_library(${name} OBJECT)
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${archs}")
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr ${ARGN})
endfunction()

function(deltafuse_link_cuda library cudart)
  target_include_directories(${library} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_libraries(${library} PRIVATE ${ARGN} ${cudart})
endfunction()

if(cuda STREQUAL "native")
  # -lineinfo puts source paths into the library: not in a release
  set(flags $<$<NOT:$<CONFIG:Release>>:-lineinfo> -Xptxas=-v,--warn-on-spills)
  set(general ${DELTAFUSE_CUDA_ARCHS})
  list(FILTER general EXCLUDE REGEX "a$")
  list(TRANSFORM general APPEND -real)
  deltafuse_cuda_objects(df_cuda "${general};90-real;90-virtual" ${flags})
  set(objects df_cuda)
  deltafuse_link_cuda(deltafuse CUDA::cudart_static df_cuda)
  # df_sm90a is made by the first operator that has *_sm90.cu files: no empty object libraries
  function(deltafuse_sm90_objects)
    if(NOT TARGET df_sm90a)
      deltafuse_cuda_objects(df_sm90a 90a-real ${flags})
      target_link_libraries(deltafuse PRIVATE df_sm90a)
    endif()
  endfunction()
else()
  set(emulated ${root}/build/emulated)  # fixed: the tests look here
  find_path(CUEMU_DIR cuemu.py HINTS ENV CUEMU_DIR REQUIRED NO_DEFAULT_PATH
            PATHS ${root}/../shared/cuemu ${root}/shared/cuemu ${root}/../cuemu)
  configure_file(${CUEMU_DIR}/cuemu.py ${emulated}/cuemu.py COPYONLY)
  file(GLOB sources CONFIGURE_DEPENDS ${CUEMU_DIR}/*.cpp ${CUEMU_DIR}/*.h ${CUEMU_DIR}/build.sh)
  set(cudart ${emulated}/libcudart.so.13)
  add_custom_command(OUTPUT ${cudart} DEPENDS ${sources} ${root}/third_party/prepare_cuemu.cmake
    COMMAND ${CMAKE_COMMAND} -DFROM=${CUEMU_DIR} -DTO=${emulated}/cuemu
            -P ${root}/third_party/prepare_cuemu.cmake
    COMMAND ${CMAKE_COMMAND} -E env CUDA_HOME=${CUDAToolkit_TARGET_DIR}
            sh ${emulated}/cuemu/build.sh ${emulated})
  add_custom_target(cuemu DEPENDS ${cudart})
  add_custom_target(emulated)
  foreach(arch IN LISTS DELTAFUSE_CUDA_ARCHS)
    set(library deltafuse_emulated_sm${arch})
    deltafuse_library(${library} "cuda emulated ${arch}")
    # the emulator reads uncompressed PTX and is the shared runtime
    deltafuse_cuda_objects(df_cuda_sm${arch} ${arch}-virtual -lineinfo -no-compress -cudart=shared)
    add_dependencies(${library} cuemu)
    add_dependencies(emulated ${library})
    target_compile_definitions(${library} PRIVATE DF_EMULATED DF_NAMESPACE=${library} DF_CUDA=CPU)
    set_target_properties(${library} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${emulated}
                          BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
    deltafuse_link_cuda(${library} ${cudart} df_cuda_sm${arch})
    # a program that tests common/cuda by itself
    set(program tile_products_sm${arch})
    add_executable(${program} tests/cpp/tile_products.cu)
    set_target_properties(${program} PROPERTIES CUDA_ARCHITECTURES ${arch}-virtual
                          RUNTIME_OUTPUT_DIRECTORY ${emulated} CUDA_RUNTIME_LIBRARY None
                          LINKER_LANGUAGE CXX BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
    target_compile_options(${program} PRIVATE --expt-relaxed-constexpr -no-compress -cudart=shared)
    if(arch STREQUAL "90a")
      target_compile_definitions(${program} PRIVATE TEST_SM90)
    endif()
    add_dependencies(${program} cuemu)
    deltafuse_link_cuda(${program} ${cudart})
    add_dependencies(emulated ${program})
  endforeach()
endif()

function(deltafuse_add_cuda schemas)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "HOST;KERNELS;SM90")
  if(cuda STREQUAL "native")
    target_sources(deltafuse PRIVATE ${arg_HOST})
    target_sources(df_cuda PRIVATE ${arg_KERNELS})
    if(arg_SM90 AND 90a IN_LIST DELTAFUSE_CUDA_ARCHS)
      deltafuse_sm90_objects()
      target_sources(df_sm90a PRIVATE ${arg_SM90})
    endif()
    return()
  endif()
  foreach(arch IN LISTS DELTAFUSE_CUDA_ARCHS)
    target_sources(deltafuse_emulated_sm${arch} PRIVATE ${schemas} ${arg_HOST})
    target_sources(df_cuda_sm${arch} PRIVATE ${arg_KERNELS})
    if(arch STREQUAL "90a")
      target_sources(df_cuda_sm90a PRIVATE ${arg_SM90})
    endif()
  endforeach()
endfunction()
