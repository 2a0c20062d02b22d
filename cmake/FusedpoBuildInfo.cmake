# Writes _build_info.json, which is installed beside the libraries and read by `python -m fusedpo`.

set(_version "unknown")
if(SKBUILD_PROJECT_VERSION_FULL)
  set(_version "${SKBUILD_PROJECT_VERSION_FULL}")
endif()

# ["a", "b"] from a CMake list; the names written here need no escaping.
function(fusedpo_json_list out)
  list(TRANSFORM ARGN REPLACE "(.+)" "\"\\1\"" OUTPUT_VARIABLE quoted)
  list(JOIN quoted ", " joined)
  set(${out} "[${joined}]" PARENT_SCOPE)
endfunction()
fusedpo_json_list(_isas ${FUSEDPO_ISAS})

fusedpo_json_list(_cuda_archs ${FUSEDPO_CUDA_ARCH_LIST})

set(_cuda false)
set(_nvcc null)
if(FUSEDPO_CUDA_ENABLED)
  set(_cuda true)
  set(_nvcc "\"${CMAKE_CUDA_COMPILER_VERSION}\"")
endif()

file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/_build_info.json" @ONLY CONTENT [=[
{
  "version": "@_version@",
  "native": true,
  "reason": null,
  "compiler": "@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@",
  "build_type": "@CMAKE_BUILD_TYPE@",
  "torch_headers": "@TorchStable_VERSION@",
  "torch_target": "@TORCH_STABLE_TARGET@",
  "isas": @_isas@,
  "cuda": @_cuda@,
  "cuda_reason": "@FUSEDPO_CUDA_REASON@",
  "nvcc": @_nvcc@,
  "cuda_archs": @_cuda_archs@
}
]=])
message(STATUS "fusedpo: ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}, torch ${TorchStable_VERSION} "
               "(target ${TORCH_STABLE_TARGET}), instruction sets ${FUSEDPO_ISAS}")
