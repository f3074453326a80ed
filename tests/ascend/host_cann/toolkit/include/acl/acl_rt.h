// In place of CANN's header of the same name: what the project's GE operators call.

#pragma once

#include <cstdint>

constexpr int ACL_SUCCESS = 0;
enum aclrtDevResLimitType { ACL_RT_DEV_RES_CUBE_CORE = 0, ACL_RT_DEV_RES_VECTOR_CORE = 1 };
extern "C" int aclrtGetStreamResLimit(void* stream, aclrtDevResLimitType type, uint32_t* value);
