//! Positional I/O between files and guest memory.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Vectors in one host call (the kernel's `UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// One host call: moves bytes at an offset for the given vectors.
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Repeats `call` until all of `vectors` is moved.
///
/// # Safety
/// Each vector describes memory that stays mapped and may be read (or written, if `call` writes it) by
/// others at the same time.
unsafe fn move_all(
    fd: BorrowedFd<'_>,
    vectors: &mut [libc::iovec],
    mut offset: u64,
    call: Call,
) -> io::Result<()> {
    let mut rest = vectors;
    while !rest.is_empty() {
        if rest[0].iov_len == 0 {
            rest = &mut rest[1..];
            continue;
        }
        let at = libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let count = rest.len().min(MAX_VECTORS);
        // SAFETY: the vectors are valid by the caller's word, `count` of them are there, fd is open.
        let moved = unsafe { call(fd.as_raw_fd(), rest.as_ptr(), count as libc::c_int, at) };
        if moved < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut left = moved as usize;
        offset += left as u64;
        let mut done = 0;
        for vector in rest.iter_mut() {
            let step = left.min(vector.iov_len);
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(step).cast();
            vector.iov_len -= step;
            left -= step;
            if vector.iov_len != 0 {
                break;
            }
            done += 1;
        }
        rest = &mut rest[done..];
    }
    Ok(())
}

/// Fills `into` from `offset` on; a file that ends before is an error. The bitmaps are told.
pub(crate) fn read_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    into: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<()> {
    let guards: Vec<_> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: the guards keep the memory mapped; volatile slices are made for concurrent access.
    let result = unsafe { move_all(fd, &mut vectors, offset, libc::preadv) };
    for slice in into {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    result
}

/// Writes all of `from` at `offset`.
pub(crate) fn write_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    from: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<()> {
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: the guards keep the memory mapped; `pwritev` only reads it.
    unsafe { move_all(fd, &mut vectors, offset, libc::pwritev) }
}
