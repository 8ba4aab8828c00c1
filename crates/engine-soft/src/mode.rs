//! [`Mode`]: everything besides the bytes that decides how code is translated.

use wardian_cpu::bits::{cr0, cr4, rflags};

use crate::core::{Core, seg};
use crate::ctx::View;

/// Part of a block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Mode {
    bits: u32,
    /// Base of CS outside 64-bit mode.
    pub cs_base: u32,
}

const SIZE: u32 = 0;
const VIEW: u32 = 2;
/// ES, CS, SS, DS are flat (base 0, limit 4 GiB, usable as the mode needs), FS and GS need only their base.
const FLAT: u32 = 4;
const STACK32: u32 = 10;
const NO_FPU: u32 = 11;
const NO_SSE: u32 = 12;
const NO_AVX: u32 = 13;
const SINGLE: u32 = 14;
const ALIGN: u32 = 15;
const NO_WAIT: u32 = 16;
const WATCHED: u32 = 17;
const NO_EVEX: u32 = 18;
const SMAP: u32 = 19;
const RING12: u32 = 20;

impl Mode {
    /// The mode that `core` is in; `single`: one instruction at a time.
    pub fn of(core: &Core, single: bool) -> Mode {
        let sys = &core.sys;
        let mut bits = 0;
        let code64 = core.is_64bit();
        let cs = &sys.segments[seg::CS];
        let size = if code64 { 2 } else { u32::from(cs.big()) };
        bits |= size << SIZE | (core.view() as u32) << VIEW;
        if code64 {
            bits |= 0x3f << FLAT | 1 << STACK32;
        } else {
            for (n, s) in sys.segments.iter().enumerate() {
                let whole =
                    s.limit == u32::MAX && !s.unusable() && (!core.protected() || s.rights & 0xc != 4);
                let access = match n {
                    seg::CS => true,
                    _ => !core.protected() || core.v86() || s.rights & 0xa == 2, // writable data
                };
                let flat = whole && access && (s.base == 0 || n >= seg::FS);
                bits |= u32::from(flat) << (FLAT + n as u32);
            }
            bits |= u32::from(sys.segments[seg::SS].big()) << STACK32;
        }
        let fpu_off = sys.cr0 & (cr0::TS | cr0::EM) != 0;
        bits |= u32::from(fpu_off) << NO_FPU;
        bits |= u32::from(sys.cr4 & cr4::OSFXSR == 0 || sys.cr0 & cr0::EM != 0) << NO_SSE;
        bits |=
            u32::from(sys.cr4 & cr4::OSXSAVE == 0 || sys.xcr0 & 6 != 6 || !core.protected() || core.v86())
                << NO_AVX;
        bits |= u32::from(bits >> NO_AVX & 1 != 0 || sys.xcr0 & 0xe6 != 0xe6) << NO_EVEX;
        let rf = core.c().rflags;
        bits |= u32::from(single || rf & rflags::TF != 0) << SINGLE;
        bits |= u32::from(core.alignment_checked()) << ALIGN;
        bits |= u32::from(sys.cr0 & cr0::TS != 0 && sys.cr0 & cr0::MP != 0) << NO_WAIT;
        bits |= u32::from(!core.watch.is_empty()) << WATCHED;
        bits |= u32::from(sys.cr4 & cr4::SMAP != 0) << SMAP;
        bits |= u32::from(matches!(sys.cpl, 1 | 2)) << RING12;
        Mode { bits, cs_base: if code64 { 0 } else { core.c().seg_base[seg::CS] as u32 } }
    }

    /// That of 64-bit user code with nothing switched off.
    #[cfg(test)]
    pub fn user64() -> Mode {
        Mode { bits: 2 << SIZE | 0x3f << FLAT | 1 << STACK32, cs_base: 0 }
    }
    /// A single number for hashing.
    pub fn hash(self) -> u64 {
        u64::from(self.bits) << 32 | u64::from(self.cs_base)
    }
    /// As the context keeps them.
    pub fn bits(self) -> u32 {
        self.bits
    }
    /// The same but for the view.
    pub fn with_view(self, view: View) -> Mode {
        Mode { bits: self.bits & !(3 << VIEW) | (view as u32) << VIEW, ..self }
    }
    /// Privilege level 0.
    pub fn ring0(self) -> bool {
        self.view() != View::User && !self.bit(RING12)
    }
    /// CR4.SMAP is set (and the model has it).
    pub fn smap(self) -> bool {
        self.bit(SMAP)
    }
    fn bit(self, n: u32) -> bool {
        self.bits >> n & 1 != 0
    }
    pub fn code64(self) -> bool {
        self.bits & 3 == 2
    }
    /// 16, 32 or 64.
    pub fn bitness(self) -> u32 {
        16 << (self.bits & 3)
    }
    pub fn view(self) -> View {
        match self.bits >> VIEW & 3 {
            0 => View::User,
            1 => View::Kernel,
            _ => View::KernelUser,
        }
    }
    /// Segment `n` needs no checks (and, but for FS and GS, no base).
    pub fn flat(self, n: usize) -> bool {
        self.bit(FLAT + n as u32) && !self.bit(ALIGN)
    }
    /// FS or GS has a base to add.
    pub fn based(self, n: usize) -> bool {
        n >= seg::FS
    }
    pub fn single(self) -> bool {
        self.bit(SINGLE)
    }
    /// Pushes, pops, calls and returns can be emitted.
    pub fn stack_native(self) -> bool {
        !self.watched() && self.code64() && !self.bit(ALIGN)
            || (!self.watched()
                && self.bitness() == 32
                && self.bit(STACK32)
                && self.flat(seg::SS)
                && self.near_native())
    }
    /// Indirect near jumps can be emitted.
    pub fn near_native(self) -> bool {
        !self.watched()
            && (self.code64()
                || (self.bitness() == 32 && self.cs_base == 0 && self.bit(FLAT + seg::CS as u32)))
    }
    pub fn fpu_off(self) -> bool {
        self.bit(NO_FPU)
    }
    /// FWAIT raises #NM.
    pub fn wait_off(self) -> bool {
        self.bit(NO_WAIT)
    }
    /// Some linear range is watched: a read, too, may have to stop after its instruction.
    pub fn watched(self) -> bool {
        self.bit(WATCHED)
    }
    pub fn sse_off(self) -> bool {
        self.bit(NO_SSE)
    }
    pub fn avx_off(self) -> bool {
        self.bit(NO_AVX)
    }
    /// EVEX and mask-register instructions are #UD.
    pub fn evex_off(self) -> bool {
        self.bit(NO_EVEX)
    }
    /// Linear address of code offset `ip`.
    pub fn linear(self, ip: u64) -> u64 {
        match self.bits & 3 {
            2 => ip,
            1 => (u64::from(self.cs_base) + ip) & 0xffff_ffff,
            _ => (u64::from(self.cs_base) + (ip & 0xffff)) & 0xffff_ffff,
        }
    }
    /// Code offset of linear address `linear`.
    pub fn ip(self, linear: u64) -> u64 {
        if self.code64() { linear } else { linear.wrapping_sub(u64::from(self.cs_base)) & 0xffff_ffff }
    }
}
