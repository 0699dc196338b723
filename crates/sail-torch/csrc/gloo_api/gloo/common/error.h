// Named by ProcessGroupGloo.hpp's list of headers; nothing of it is used.
#pragma once
