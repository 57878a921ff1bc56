# The CUDA kernels: the C++ tests run their source on the host; nvcc compiles them if ACE_NVCC is set.
# Expects the function ace_add_test, the target Threads::Threads and ACE_SANITIZE ("", "address,undefined" or "thread").
file(GLOB ACE_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
set(ACE_SIMT_DEFINITIONS ACE_SIMT)
if(ACE_SANITIZE STREQUAL "thread")
  list(APPEND ACE_SIMT_DEFINITIONS ACE_SIMT_THREADS)  # one OS thread per CUDA thread, for ThreadSanitizer
endif()

# Launchers and kernels as plain C++: a generated .cpp includes each .cu, so that nvcc can still compile the .cu.
set(ACE_HOST_SOURCES)
foreach(source IN LISTS ACE_CUDA_SOURCES)
  get_filename_component(name "${source}" NAME_WE)
  set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/host_kernels/${name}.cpp")
  configure_file(cmake/host_kernel.cpp.in "${wrapper}")
  list(APPEND ACE_HOST_SOURCES "${wrapper}")
endforeach()
add_library(ace_host_kernels STATIC ${ACE_HOST_SOURCES})
target_include_directories(ace_host_kernels PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_definitions(ace_host_kernels PUBLIC ${ACE_SIMT_DEFINITIONS})
# -ffp-contract=off: scores must have the same bits as the plain C++ functors, as on the device (--fmad=false).
target_compile_options(ace_host_kernels PRIVATE -Wall -Wextra -Werror -ffp-contract=off)
target_link_libraries(ace_host_kernels PUBLIC Threads::Threads)
if(ACE_SANITIZE)
  target_compile_options(
    ace_host_kernels PRIVATE -fsanitize=${ACE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
endif()

file(GLOB ACE_CUDA_TESTS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/tests/cuda_*_test.cpp")
foreach(test IN LISTS ACE_CUDA_TESTS)
  get_filename_component(name "${test}" NAME_WE)
  ace_add_test(${name} "${test}")
  target_link_libraries(${name} PRIVATE ace_host_kernels)
endforeach()

if(ACE_SANITIZE STREQUAL "thread")
  # A kernel with one barrier removed on purpose: ThreadSanitizer must report the race.
  add_test(NAME cuda_dropped_barrier_is_a_race
           COMMAND cuda_barrier_test --gtest_also_run_disabled_tests --gtest_filter=*DISABLED_OneBarrierLess*)
  set_tests_properties(cuda_dropped_barrier_is_a_race PROPERTIES PASS_REGULAR_EXPRESSION "ThreadSanitizer: data race")
endif()

# For editors, and to build the kernels with CMake. tools/check_nvcc.sh compiles the same files and counts spills.
option(ACE_NVCC "Also compile the .cu files with nvcc (target ace_device_kernels)" OFF)
if(ACE_NVCC)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
  endif()
  enable_language(CUDA)
  add_library(ace_device_kernels STATIC ${ACE_CUDA_SOURCES})
  target_include_directories(ace_device_kernels PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_options(ace_device_kernels PRIVATE --fmad=false -Werror=all-warnings)
  set_target_properties(ace_device_kernels PROPERTIES CUDA_STANDARD 17)
endif()
