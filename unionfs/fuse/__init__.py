"""Between the kernel and the core: requests and their answers, open files, and what the native layer does by itself.

`ops` and `bind_ops` answer through pyfuse3, `direct` and `bind_direct` the frequent requests past it, `native` speaks
for the C part, `dispatch` is the loop that receives.
"""
