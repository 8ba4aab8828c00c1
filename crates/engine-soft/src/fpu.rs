//! The guest's x87 and vector state between this thread's registers, the context and the XSAVE image.
//!
//! While a helper runs, the vector registers are in [`Ctx::vec`](crate::ctx::Ctx) and the x87 state and MXCSR are
//! live in the thread. Outside `run` everything is in the context.

use std::arch::asm;

use crate::core::Core;

/// Offset of the upper YMM halves in the standard XSAVE image.
const YMM_HIGH: usize = 576;
const HOST_MXCSR: u32 = 0x1f80;

/// Takes the guest's x87 state and MXCSR from the image into the thread.
fn load_x87(image: *const u8) {
    // SAFETY: the image is a 64-byte aligned area of the context whose MXCSR was validated; the vector registers that
    // FXRSTOR writes are declared as clobbered.
    unsafe {
        asm!("fxrstor64 [{0}]", in(reg) image, options(nostack),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _, out("st(0)") _, out("st(1)") _, out("st(2)") _,
            out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
    }
}

/// Puts the thread's x87 state and MXCSR into the image (its XMM part becomes garbage).
fn store_x87(image: *mut u8) {
    // SAFETY: the image is a 64-byte aligned area of 512 bytes and more in the context.
    unsafe { asm!("fxsave64 [{0}]", in(reg) image, options(nostack)) };
}

/// Before translated code runs on this thread.
pub fn enter(core: &mut Core) {
    let image = core.ctx.get().xsave.as_ptr();
    load_x87(image);
}

/// After: the thread gets back the state that Rust code expects.
pub fn leave(core: &mut Core) {
    store_x87(core.ctx.get_mut().xsave.as_mut_ptr());
    let (mxcsr, fcw) = (HOST_MXCSR, 0x37fu16);
    // SAFETY: loads the ABI's default control words from valid memory.
    unsafe {
        asm!("fninit", "fldcw [{1}]", "ldmxcsr [{0}]", in(reg) &raw const mxcsr, in(reg) &raw const fcw, options(nostack),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
            out("st(6)") _, out("st(7)") _);
    }
}

/// Completes the image from the vector registers in the context; clears the x87 pointers, which would show where
/// translated code lies.
pub fn complete(core: &mut Core) {
    let ctx = core.ctx.get_mut();
    for n in 0..16 {
        let (xmm, high) = (160 + n * 16, YMM_HIGH + n * 16);
        let vec = ctx.vec[n];
        ctx.xsave[xmm..xmm + 16].copy_from_slice(&vec[..16]);
        ctx.xsave[high..high + 16].copy_from_slice(&vec[16..32]);
    }
    ctx.xsave[6..24].fill(0);
    ctx.xsave[512..576].fill(0);
    ctx.xsave[512] = 7;
}

/// Takes the vector registers from the image into the context.
pub fn spread(core: &mut Core) {
    let ctx = core.ctx.get_mut();
    for n in 0..16 {
        let (xmm, high) = (160 + n * 16, YMM_HIGH + n * 16);
        ctx.vec[n][..16].copy_from_slice(&ctx.xsave[xmm..xmm + 16]);
        ctx.vec[n][16..32].copy_from_slice(&ctx.xsave[high..high + 16]);
    }
}

/// Within a helper: writes the guest's whole state to the image.
pub fn store(core: &mut Core) {
    store_x87(core.ctx.get_mut().xsave.as_mut_ptr());
    complete(core);
}

/// Within a helper: takes the guest's whole state from the image. The MXCSR in it must be valid.
pub fn load(core: &mut Core) {
    spread(core);
    load_x87(core.ctx.get().xsave.as_ptr());
}
