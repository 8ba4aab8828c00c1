//! Signals that end the process: the terminal is put right first, and whoever asked is told. And those that pause
//! it and let it go on.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Once, OnceLock};

use crate::Event;

/// Signals that ask for an end, or are one. Faults (SIGSEGV and its like) are left to the engines.
const SIGNALS: [libc::c_int; 5] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGABRT];

/// Descriptor of the event to signal, or -1.
static ASKED: AtomicI32 = AtomicI32::new(-1);
/// Keeps that descriptor open for good.
static EVENT: OnceLock<Arc<Event>> = OnceLock::new();

extern "C" fn handle(signal: libc::c_int) {
    // SAFETY: the location of errno is valid in every thread.
    let errno = unsafe { *libc::__errno_location() };
    let asked = if signal == libc::SIGABRT { -1 } else { ASKED.swap(-1, Ordering::AcqRel) };
    if asked >= 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live array; write(2) is async-signal-safe.
        unsafe { libc::write(asked, one.as_ptr().cast(), one.len()) };
    } else {
        crate::terminal::restore();
        // SAFETY: both calls are async-signal-safe; the raised signal is delivered with its default action
        // when this handler returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Installs the handlers, once; a signal that is ignored or already handled by someone else stays so.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in SIGNALS {
            // SAFETY: zeroed sigactions are valid (default action, empty mask); the pointers are live; the
            // handler only makes async-signal-safe calls.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &raw mut old) != 0
                    || old.sa_sigaction != libc::SIG_DFL
                {
                    continue;
                }
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = handle as extern "C" fn(libc::c_int) as usize;
                new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const new, std::ptr::null_mut());
            }
        }
    });
}

/// Descriptors of the events for SIGUSR1 and SIGUSR2, or -1.
static USER: [AtomicI32; 2] = [AtomicI32::new(-1), AtomicI32::new(-1)];
static USER_EVENTS: OnceLock<[Arc<Event>; 2]> = OnceLock::new();

extern "C" fn handle_user(signal: libc::c_int) {
    // SAFETY: the location of errno is valid in every thread.
    let errno = unsafe { *libc::__errno_location() };
    let fd = USER[usize::from(signal == libc::SIGUSR2)].load(Ordering::Acquire);
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes 8 bytes from a live array; write(2) is async-signal-safe. Errno is put back.
    unsafe {
        libc::write(fd, one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

/// From now on SIGUSR1 signals `pause` and SIGUSR2 `resume`. For one pair of events per process.
///
/// # Errors
/// When there is one already, or the host refuses.
pub fn on_pause(pause: Arc<Event>, resume: Arc<Event>) -> io::Result<()> {
    let fds = [pause.as_fd().as_raw_fd(), resume.as_fd().as_raw_fd()];
    USER_EVENTS.set([pause, resume]).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    for (place, (fd, signal)) in USER.iter().zip(fds.into_iter().zip([libc::SIGUSR1, libc::SIGUSR2])) {
        place.store(fd, Ordering::Release);
        // SAFETY: a zeroed sigaction is valid; the pointers are live; the handler only makes async-signal-safe
        // calls.
        let done = unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = handle_user as extern "C" fn(libc::c_int) as usize;
            new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const new, std::ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The first SIGHUP, SIGINT, SIGQUIT or SIGTERM signals `event` instead of ending the process, so that disks
/// can be closed in peace; the second one ends it, with the terminal restored. For one event per process.
///
/// # Errors
/// When there is an event already.
pub fn on_terminate(event: Arc<Event>) -> io::Result<()> {
    let fd = event.as_fd().as_raw_fd();
    EVENT.set(event).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    ASKED.store(fd, Ordering::Release);
    install();
    Ok(())
}
