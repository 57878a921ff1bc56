# The CUDA kernels. The C++ tests run their source on the host; nvcc compiles them if ACE_NVCC is set.
# Expects the function ace_add_test, the target Threads::Threads and ACE_SANITIZE ("", "address,undefined" or "thread").
file(GLOB ACE_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")

# The PTX interpreter of the host emulator.
file(GLOB ACE_PTX_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/simt/ptx/*.cpp")
add_library(ace_simt STATIC ${ACE_PTX_SOURCES})
target_include_directories(ace_simt PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_definitions(ace_simt PUBLIC ACE_SIMT)
set(ACE_RUNNER_OPTIMIZE -O2)
if(ACE_SANITIZE AND NOT ACE_PTX_FOLDERS)
  set(ACE_RUNNER_OPTIMIZE -O0)  # it runs little then, and compiling dominates
endif()
target_compile_options(ace_simt PRIVATE ${ACE_RUNNER_OPTIMIZE} -Wall -Wextra -Werror -ffp-contract=off)
target_link_libraries(ace_simt PUBLIC Threads::Threads ${CMAKE_DL_LIBS})

# Launchers and kernels as plain C++. A generated .cpp includes each .cu, so that nvcc can still compile the .cu.
set(ACE_HOST_SOURCES)
foreach(source IN LISTS ACE_CUDA_SOURCES)
  get_filename_component(name "${source}" NAME_WE)
  set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/host_kernels/${name}.cpp")
  configure_file(cmake/host_kernel.cpp.in "${wrapper}")
  list(APPEND ACE_HOST_SOURCES "${wrapper}")
endforeach()
add_library(ace_host_kernels STATIC ${ACE_HOST_SOURCES})
target_include_directories(ace_host_kernels PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_definitions(ace_host_kernels PUBLIC ACE_SIMT)
# -ffp-contract=off: scores must have the same bits as the plain C++ functors, as on the device (--fmad=false).
target_compile_options(ace_host_kernels PRIVATE -Wall -Wextra -Werror -ffp-contract=off)
target_link_libraries(ace_host_kernels PUBLIC ace_simt)
option(ACE_ALL_TYPES "With a sanitizer too, build and test the kernels for float16; without one they always are" OFF)
if(ACE_SANITIZE AND NOT ACE_ALL_TYPES)
  target_compile_definitions(ace_host_kernels PUBLIC ACE_WITHOUT_HALF)
endif()
if(ACE_SANITIZE MATCHES "address")  # hundreds of kernels: optimizing takes far longer than the tests save
  set_source_files_properties(
    "${CMAKE_CURRENT_BINARY_DIR}/host_kernels/prune_rows.cpp" "${CMAKE_CURRENT_BINARY_DIR}/host_kernels/prune_nm.cpp"
    PROPERTIES COMPILE_OPTIONS -O0)
endif()
if(ACE_SANITIZE)
  target_compile_options(
    ace_host_kernels PRIVATE -fsanitize=${ACE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
endif()

# Folders of .ptx files, one for each architecture (made by tools/make_ptx.sh). The kernel tests run again on each of
# them.
set(ACE_PTX_FOLDERS "" CACHE STRING "Folders of .ptx files on which the CUDA tests run as well")
function(ace_test_on_ptx name)
  foreach(folder IN LISTS ACE_PTX_FOLDERS)
    get_filename_component(arch "${folder}" NAME)
    add_test(NAME ${name}.${arch} COMMAND ${name})
    set_tests_properties(${name}.${arch} PROPERTIES ENVIRONMENT "ACE_PTX=${folder}")
  endforeach()
endfunction()

file(GLOB ACE_CUDA_TESTS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/tests/cuda_*_test.cpp")
foreach(test IN LISTS ACE_CUDA_TESTS)
  get_filename_component(name "${test}" NAME_WE)
  ace_add_test(${name} "${test}" ${ACE_UNOPTIMIZED})  # the kernels are in the library
  target_link_libraries(${name} PRIVATE ace_host_kernels)
  set_target_properties(${name} PROPERTIES ENABLE_EXPORTS ON)  # a kernel's PTX is found by its symbol
  ace_test_on_ptx(${name})
endforeach()

# Not a test: counts instructions for benchmarks/predict.py, with inputs from the tests' headers.
if(NOT ACE_SANITIZE)
  add_executable(count_instructions csrc/tests/count_instructions.cpp)
  target_include_directories(count_instructions PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_options(count_instructions PRIVATE -Wall -Wextra -Werror -ffp-contract=off)
  target_link_libraries(count_instructions PRIVATE ace_host_kernels GTest::gtest Threads::Threads)
  set_target_properties(count_instructions PROPERTIES ENABLE_EXPORTS ON)
endif()

ace_add_test(simt_ptx_test csrc/tests/simt_ptx_test.cpp)
target_link_libraries(simt_ptx_test PRIVATE ace_simt)

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
