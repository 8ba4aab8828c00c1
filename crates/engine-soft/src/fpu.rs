//! The guest's x87 and vector state between this thread's registers, the context and the XSAVE image.
//!
//! While a helper runs, the vector registers are in [`Ctx::vec`](crate::ctx::Ctx) and the x87 state and MXCSR are
//! live in the thread. Outside `run` everything is in the context.
//!
//! AVX-512 state is moved no more often than it is used. Blocks with 512-bit instructions set `vec_mode` to 2 when they
//! are entered; before that everything above bit 255 is zero and thunks move YMM registers. Blocks with EVEX or
//! mask-register instructions load vector registers 16-31 and the mask registers when they are entered and find them
//! not live; leaving translated code saves them if they are, entering it does not load them.

use std::arch::asm;
use std::sync::OnceLock;

use crate::core::Core;

/// Offset of the upper YMM halves in the standard XSAVE image.
const YMM_HIGH: usize = 576;
const HOST_MXCSR: u32 = 0x1f80;

/// Takes the guest's x87 state and MXCSR from the image into the thread.
pub fn load_x87(image: *const u8) {
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
pub fn store_x87(image: *mut u8) {
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

/// Offsets of the AVX-512 components in the standard XSAVE image: mask registers, upper halves of ZMM0-ZMM15,
/// ZMM16-ZMM31 (Intel SDM vol. 1, 13.5.6). They are the host's.
fn avx512_layout() -> Option<[usize; 3]> {
    static LAYOUT: OnceLock<Option<[usize; 3]>> = OnceLock::new();
    *LAYOUT.get_or_init(|| {
        let features = std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512cd");
        let places = [5, 6, 7].map(|n| std::arch::x86_64::__cpuid_count(0xd, n));
        let fits = places.iter().zip([64, 512, 1024]).all(|(p, len)| {
            p.eax == len
                && p.ebx as usize >= YMM_HIGH
                && p.ebx as usize + len as usize <= size_of::<[u8; 4096]>()
        });
        (features && fits).then(|| places.map(|p| p.ebx as usize))
    })
}

/// Whether the host has, and its kernel has switched on, all of AVX-512 that translated code and its thunks need.
pub fn carries_avx512() -> bool {
    avx512_layout().is_some()
}

/// Without an early end, so that it is done many bytes at a time.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

/// Chooses the width of vector registers 0-15 by XCR0 and what they hold.
pub fn set_width(core: &mut Core) {
    let xcr0 = core.sys.xcr0;
    let ctx = core.ctx.get_mut();
    ctx.vec_mode = if xcr0 & 4 == 0 {
        0
    } else if xcr0 & 0xe0 != 0 && ctx.vec.iter().any(|v| !is_zero(&v[32..])) {
        2
    } else {
        1
    };
}

/// Completes the image from the vector registers in the context; clears the x87 pointers, which would show where
/// translated code lies. AVX-512 components are left out while they are in their initial state.
pub fn complete(core: &mut Core) {
    let avx512 = core.model.xcr0_mask() & 0xe0 != 0;
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
    if avx512 && let Some([masks, upper, last]) = avx512_layout() {
        let mut used = 0;
        for (n, mask) in ctx.mask.iter().enumerate() {
            ctx.xsave[masks + n * 8..masks + n * 8 + 8].copy_from_slice(&mask.to_le_bytes());
            used |= u8::from(*mask != 0) << 5;
        }
        for (n, vec) in ctx.vec.iter().enumerate() {
            let (value, at, bit) =
                if n < 16 { (&vec[32..], upper + n * 32, 6) } else { (&vec[..], last + (n - 16) * 64, 7) };
            ctx.xsave[at..at + value.len()].copy_from_slice(value);
            used |= u8::from(!is_zero(value)) << bit;
        }
        ctx.xsave[512] |= used;
    }
}

/// Takes the vector registers from the image into the context.
pub fn spread(core: &mut Core) {
    let avx512 = core.model.xcr0_mask() & 0xe0 != 0;
    let ctx = core.ctx.get_mut();
    for n in 0..16 {
        let (xmm, high) = (160 + n * 16, YMM_HIGH + n * 16);
        ctx.vec[n][..16].copy_from_slice(&ctx.xsave[xmm..xmm + 16]);
        ctx.vec[n][16..32].copy_from_slice(&ctx.xsave[high..high + 16]);
    }
    if avx512 && let Some([masks, upper, last]) = avx512_layout() {
        let has = |bit: u8| ctx.xsave[512] >> bit & 1 != 0;
        let (masked, wide, many) = (has(5), has(6), has(7));
        for n in 0..8 {
            let mut bytes = [0u8; 8];
            if masked {
                bytes.copy_from_slice(&ctx.xsave[masks + n * 8..masks + n * 8 + 8]);
            }
            ctx.mask[n] = u64::from_le_bytes(bytes);
        }
        for n in 0..16 {
            if wide {
                ctx.vec[n][32..].copy_from_slice(&ctx.xsave[upper + n * 32..upper + n * 32 + 32]);
            } else {
                ctx.vec[n][32..].fill(0);
            }
            if many {
                ctx.vec[n + 16].copy_from_slice(&ctx.xsave[last + n * 64..last + n * 64 + 64]);
            } else {
                ctx.vec[n + 16].fill(0);
            }
        }
    }
    set_width(core);
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
