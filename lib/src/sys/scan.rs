//! PAGEMAP_SCAN and kcmp, which rustix does not have.

use std::ffi::c_void;
use std::os::fd::AsFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{self, IoctlOutput, Opcode};

/// Categories of pages as linux/fs.h numbers them (`PAGE_IS_*`).
pub(crate) mod category {
    pub(crate) const FILE: u64 = 1 << 2;
    pub(crate) const PRESENT: u64 = 1 << 3;
    pub(crate) const SWAPPED: u64 = 1 << 4;
    pub(crate) const ZERO: u64 = 1 << 5;
    /// Guard markers, known to Linux 6.15 and later.
    pub(crate) const GUARD: u64 = 1 << 8;
}

/// Consecutive pages of one process (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug)]
struct Arguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages a scan is for: those with any category of `any` and none of `none`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) any: u64,
    pub(crate) none: u64,
}

/// Fills `regions` with the wanted pages from `start` to `end` of the process whose
/// `/proc/PID/pagemap` is `pagemap`. Says how many regions are filled, and how far it came: to
/// `end`, or less far when `regions` was full.
///
/// Linux 6.7 and later; before that ENOTTY.
pub(crate) fn pagemap_scan(
    pagemap: impl AsFd,
    start: u64,
    end: u64,
    wanted: Wanted,
    regions: &mut [Region],
) -> Result<(usize, u64)> {
    let call = Scan(Arguments {
        size: size_of::<Arguments>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: wanted.none,
        category_mask: wanted.none,
        category_anyof_mask: wanted.any,
        return_mask: wanted.any,
    });
    // SAFETY: the kernel reads one `Arguments`, writes its `walk_end`, and writes at most
    // `vec_len` regions to `vec`, which `regions` borrows mutably for the length of the call.
    // Any bytes are valid regions. A descriptor that is no pagemap refuses the opcode.
    let (filled, walk_end) = unsafe { ioctl::ioctl(pagemap, call) }?;
    Ok((filled.min(regions.len()), walk_end))
}

struct Scan(Arguments);

// SAFETY: the opcode's direction and size are those of `Arguments`, which is what `as_ptr` points
// to; the output is read from that struct and from the return value.
unsafe impl ioctl::Ioctl for Scan {
    type Output = (usize, u64);

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        ioctl::opcode::read_write::<Arguments>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, pointer: *mut c_void) -> Result<Self::Output> {
        // SAFETY: `pointer` is what `as_ptr` gave out, and the call is over.
        let walk_end = unsafe { (*pointer.cast::<Arguments>()).walk_end };
        let filled = usize::try_from(output).map_err(|_| Errno::RANGE)?;
        Ok((filled, walk_end))
    }
}

/// Whether two processes share one address space. `None`: the kernel does not say.
pub(crate) fn same_memory(one: u32, other: u32) -> Option<bool> {
    const KCMP_VM: libc::c_ulong = 1;
    let unused: libc::c_ulong = 0;
    // SAFETY: kcmp takes five integers and touches no memory of this process.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_ulong::from(one),
            libc::c_ulong::from(other),
            KCMP_VM,
            unused,
            unused,
        )
    };
    (order >= 0).then_some(order == 0)
}
