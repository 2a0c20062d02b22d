# Settles FUSEDPO_CUDA (AUTO, ON, OFF) and FUSEDPO_CUDA_ARCHS, or stops with the remedy.
#
#   FUSEDPO_CUDA_ENABLED    a working nvcc is there and wanted
#   FUSEDPO_CUDA_ARCH_LIST  architectures to compile for; empty when not enabled
#   FUSEDPO_CUDA_CODE       nvcc's options for the release list; empty when another list was named
#   FUSEDPO_CUDA_REASON     one line for people: why, or why not

string(TOUPPER "${FUSEDPO_CUDA}" _cuda_wanted)
if(NOT _cuda_wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FUSEDPO_CUDA must be AUTO, ON or OFF; got \"${FUSEDPO_CUDA}\"")
endif()
foreach(_arch IN LISTS FUSEDPO_CUDA_ARCHS)
  if(NOT _arch MATCHES "^(AUTO|native|[0-9]+[af]?(-real|-virtual)?)$")
    message(FATAL_ERROR "FUSEDPO_CUDA_ARCHS must be AUTO or a ;-separated list of architectures such "
                        "as 90, 80-real or 90-virtual; got \"${_arch}\" in \"${FUSEDPO_CUDA_ARCHS}\"")
  endif()
endforeach()

set(FUSEDPO_CUDA_ENABLED OFF)
set(FUSEDPO_CUDA_ARCH_LIST "")
set(FUSEDPO_CUDA_CODE "")
if(_cuda_wanted STREQUAL "OFF")
  set(FUSEDPO_CUDA_REASON "switched off by FUSEDPO_CUDA=OFF")
else()
  # check_language looks for nvcc only on PATH and in CUDACXX; toolkits are often elsewhere.
  if(NOT DEFINED ENV{CUDACXX})
    find_program(FUSEDPO_NVCC nvcc PATHS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin)
    if(FUSEDPO_NVCC)
      set(ENV{CUDACXX} "${FUSEDPO_NVCC}")
    endif()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below, once the compiler version is known
    enable_language(CUDA)
    set(FUSEDPO_CUDA_ENABLED ON)
    set(FUSEDPO_CUDA_ARCH_LIST "${FUSEDPO_CUDA_ARCHS}")
    if(FUSEDPO_CUDA_ARCHS STREQUAL "AUTO")
      # One pass of the front end serves several architectures: it is half of the work, and no source
      # asks which of them it is compiled for.
      set(FUSEDPO_CUDA_ARCH_LIST 80-real 86-real 89-real 90)  # a bare number means SASS and PTX
      set(FUSEDPO_CUDA_CODE "--generate-code=arch=compute_80,code=[sm_80,sm_86,sm_89]")
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
        list(APPEND FUSEDPO_CUDA_ARCH_LIST 100-real 120)
        list(APPEND FUSEDPO_CUDA_CODE
          "--generate-code=arch=compute_90,code=[compute_90,sm_90,sm_100]"
          "--generate-code=arch=compute_120,code=[compute_120,sm_120]")
      else()
        list(APPEND FUSEDPO_CUDA_CODE "--generate-code=arch=compute_90,code=[compute_90,sm_90]")
      endif()
    endif()
    list(JOIN FUSEDPO_CUDA_ARCH_LIST " " _archs)
    set(FUSEDPO_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${_archs}")
  elseif(_cuda_wanted STREQUAL "ON")
    message(FATAL_ERROR
      "FUSEDPO_CUDA=ON needs a working nvcc, and none was found on PATH, in CUDACXX, in CUDA_HOME/bin, "
      "in CUDA_PATH/bin or in /usr/local/cuda/bin. Install the CUDA toolkit or set CUDACXX to its nvcc; "
      "or build without CUDA operators by FUSEDPO_CUDA=OFF (or AUTO).")
  else()
    set(FUSEDPO_CUDA_REASON "no working nvcc was found (FUSEDPO_CUDA=AUTO)")
  endif()
endif()
message(STATUS "fusedpo: CUDA: ${FUSEDPO_CUDA_REASON}")
