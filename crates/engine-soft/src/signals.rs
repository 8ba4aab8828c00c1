//! Host exceptions inside translated code, mapped back to the guest instruction that caused them.

use std::cell::Cell;
use std::sync::Once;

use crate::bases;
use crate::blocks::Blocks;
use crate::code::CodeMemory;
use crate::ctx::Ctx;

/// What the handler needs to know of the vCPU that runs on this thread.
#[derive(Clone, Copy)]
pub struct Running {
    pub code: *const CodeMemory,
    pub blocks: *const Blocks,
    pub ctx: *mut Ctx,
    /// Executable address of the `HostFault` thunk.
    pub leave: u64,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

/// Says which vCPU runs on this thread (or none).
pub fn set_running(running: Option<Running>) {
    RUNNING.with(|cell| cell.set(running));
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if let Some(running) = RUNNING.with(Cell::get) {
        // SAFETY: the kernel passes a valid ucontext; `running` is set only while the pointers are valid, and the
        // thread is inside translated code when its RIP lies in the code memory, so nobody else uses them; the
        // base of a mark is one that was given out, a word of the context's mapping.
        unsafe {
            let regs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            let host = regs[libc::REG_RIP as usize] as u64;
            if let Some(offset) = (*running.code).offset_of(host)
                && let Some(mark) = (*running.blocks).mark_at(offset)
            {
                let rip = if mark.base == 0 {
                    mark.rip
                } else {
                    let rbp = (*running.ctx).rbp as *const u8;
                    let base = rbp.offset(bases::disp(mark.base) as isize).cast::<u64>().read();
                    base.wrapping_add(mark.rip & 0xfff)
                };
                let trap = regs[libc::REG_TRAPNO as usize] as u64;
                if mark.flags_live {
                    let eflags = regs[libc::REG_EFL as usize] as u32;
                    (*running.ctx).flags = (eflags & 0xd5 | 2) << 8 | (eflags >> 11 & 1);
                }
                (*running.ctx).budget += i64::from(mark.left);
                regs[libc::REG_R13 as usize] = rip as i64;
                regs[libc::REG_R14 as usize] = trap as i64;
                regs[libc::REG_RIP as usize] = running.leave as i64;
                return;
            }
            if let Some(offset) = (*running.code).offset_of(host) {
                report(signal, offset, (*running.code).bytes(offset, 15), &*running.ctx);
            }
        }
    }
    // Not ours: die as without us, at the same place.
    let _ = info;
    // SAFETY: resets the disposition; the instruction faults again on return.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Says what an unexpected host exception in translated code met: a bug of the translator. Allocates nothing.
fn report(signal: i32, offset: u32, code: &[u8], ctx: &Ctx) {
    use std::io::Write;
    let mut text = [0u8; 256];
    let mut out = std::io::Cursor::new(&mut text[..]);
    let _ = write!(out, "wardian: signal {signal} in translated code at offset {offset:#x}, code");
    for byte in code {
        let _ = write!(out, " {byte:02x}");
    }
    let _ = writeln!(out, ", last known guest rip {:#x}", ctx.rip);
    let len = out.position() as usize;
    // SAFETY: writes initialized bytes to standard error.
    unsafe { libc::write(2, text.as_ptr().cast(), len) };
}

/// Installs the handlers, once per process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
            // SAFETY: a zeroed sigaction with a handler of the SA_SIGINFO type.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
        }
    });
}
