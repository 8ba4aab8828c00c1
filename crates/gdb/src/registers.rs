//! Which registers the debugger sees, in which order, and where they lie in a [`CpuState`].

use wardian_cpu::bits::msr;
use wardian_cpu::{CpuState, Msr};

/// One register or a row of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// General register, by index in `CpuState::gpr`.
    Gpr(usize),
    Rip,
    Eflags,
    /// Selector, by index in `CpuState::segments`.
    Selector(usize),
    /// x87 data register ST(n).
    St(usize),
    /// x87 control and status, n-th in GDB's order (fctrl ... fop).
    Fpu(usize),
    Xmm(usize),
    Mxcsr,
    FsBase,
    GsBase,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
    /// Upper half of YMMn.
    YmmHigh(usize),
}

/// GDB's order of the general registers (rax rbx rcx rdx rsi rdi rbp rsp r8...) as indexes of `gpr`.
const GPR_ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
/// GDB's order of the selectors (cs ss ds es fs gs) as indexes of `segments`.
const SELECTOR_ORDER: [usize; 6] = [1, 2, 3, 0, 4, 5];
/// Number of registers.
pub(crate) const COUNT: usize = 82;

/// Register `number` in the order of the target description.
fn field(number: usize) -> Option<Field> {
    Some(match number {
        0..16 => Field::Gpr(GPR_ORDER[number]),
        16 => Field::Rip,
        17 => Field::Eflags,
        18..24 => Field::Selector(SELECTOR_ORDER[number - 18]),
        24..32 => Field::St(number - 24),
        32..40 => Field::Fpu(number - 32),
        40..56 => Field::Xmm(number - 40),
        56 => Field::Mxcsr,
        57 => Field::FsBase,
        58 => Field::GsBase,
        59 => Field::KernelGsBase,
        60 => Field::Cr0,
        61 => Field::Cr2,
        62 => Field::Cr3,
        63 => Field::Cr4,
        64 => Field::Cr8,
        65 => Field::Efer,
        66..COUNT => Field::YmmHigh(number - 66),
        _ => return None,
    })
}

/// Number of RIP.
pub(crate) const RIP: usize = 16;

/// Bytes of register `number` on the wire.
pub(crate) fn size(number: usize) -> Option<usize> {
    Some(match field(number)? {
        Field::Eflags | Field::Selector(_) | Field::Fpu(_) | Field::Mxcsr => 4,
        Field::St(_) => 10,
        Field::Xmm(_) | Field::YmmHigh(_) => 16,
        _ => 8,
    })
}

/// Offset of register `number` in the block of all registers.
pub(crate) fn offset(number: usize) -> usize {
    (0..number).filter_map(size).sum()
}

/// The target description.
pub(crate) const XML: &str = include_str!("target.xml");

/// Offsets in the XSAVE area (Intel SDM vol. 1, 13.4.1): legacy part, header, AVX component.
mod xsave {
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const XSTATE_BV: usize = 512;
    pub const YMM_HIGH: usize = 576;
    pub const X87_BIT: u8 = 1;
    pub const SSE_BIT: u8 = 2;
    pub const AVX_BIT: u8 = 4;
}

/// The components of the XSAVE area as they are, absent ones in their initial configuration.
struct Xsave<'a>(&'a [u8]);

impl Xsave<'_> {
    fn has(&self, bit: u8) -> bool {
        self.0.get(xsave::XSTATE_BV).is_some_and(|bv| bv & bit != 0)
    }

    fn bytes<const N: usize>(&self, bit: u8, at: usize) -> [u8; N] {
        let mut out = [0; N];
        if self.has(bit)
            && let Some(from) = self.0.get(at..at + N)
        {
            out.copy_from_slice(from);
        }
        out
    }

    fn fcw(&self) -> u16 {
        if self.has(xsave::X87_BIT) { u16::from_le_bytes(self.bytes(xsave::X87_BIT, 0)) } else { 0x37f }
    }

    fn st(&self, n: usize) -> [u8; 10] {
        self.bytes(xsave::X87_BIT, xsave::ST + 16 * n)
    }

    /// The two-bit tags of the eight physical registers (Intel SDM vol. 1, 8.1.7), from the abridged form.
    fn tags(&self) -> u16 {
        let [abridged] = self.bytes::<1>(xsave::X87_BIT, 4);
        let top = usize::from(u16::from_le_bytes(self.bytes(xsave::X87_BIT, 2)) >> 11 & 7);
        (0..8).fold(0, |tags, physical| {
            let tag =
                if abridged & (1 << physical) == 0 { 3 } else { tag(&self.st((physical + 8 - top) % 8)) };
            tags | tag << (2 * physical)
        })
    }

    fn fpu(&self, n: usize) -> u32 {
        let half = |at| u32::from(u16::from_le_bytes(self.bytes(xsave::X87_BIT, at)));
        let word = |at| u32::from_le_bytes(self.bytes(xsave::X87_BIT, at));
        match n {
            0 => u32::from(self.fcw()),
            1 => half(2),
            2 => u32::from(self.tags()),
            3 => half(12),
            4 => word(8),
            5 => half(20),
            6 => word(16),
            _ => half(6) & 0x7ff,
        }
    }

    fn mxcsr(&self) -> u32 {
        match self.0.get(xsave::MXCSR..xsave::MXCSR + 4) {
            Some(bytes) if self.has(xsave::SSE_BIT | xsave::AVX_BIT) => {
                u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            _ => 0x1f80,
        }
    }
}

/// Tag of a register that is not empty: 0 valid, 1 zero, 2 special.
fn tag(value: &[u8; 10]) -> u16 {
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    match (exponent, &value[..8]) {
        (0, [0, 0, 0, 0, 0, 0, 0, 0]) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa[7] & 0x80 == 0 => 2,
        _ => 0,
    }
}

/// Writes register `number` of `state` to the start of `out`; says how many bytes, 0 if there is no such
/// register or `out` is too short.
pub(crate) fn read(state: &CpuState, number: usize, out: &mut [u8]) -> usize {
    let (Some(field), Some(size)) = (field(number), size(number)) else { return 0 };
    let Some(out) = out.get_mut(..size) else { return 0 };
    let area = Xsave(&state.xsave);
    let value = match field {
        Field::St(n) => {
            out.copy_from_slice(&area.st(n));
            return size;
        }
        Field::Xmm(n) => {
            out.copy_from_slice(&area.bytes::<16>(xsave::SSE_BIT, xsave::XMM + 16 * n));
            return size;
        }
        Field::YmmHigh(n) => {
            out.copy_from_slice(&area.bytes::<16>(xsave::AVX_BIT, xsave::YMM_HIGH + 16 * n));
            return size;
        }
        Field::Gpr(n) => state.gpr[n],
        Field::Rip => state.rip,
        Field::Eflags => state.rflags,
        Field::Selector(n) => u64::from(state.segments[n].selector),
        Field::Fpu(n) => u64::from(area.fpu(n)),
        Field::Mxcsr => u64::from(area.mxcsr()),
        Field::FsBase => state.segments[4].base,
        Field::GsBase => state.segments[5].base,
        Field::KernelGsBase => {
            state.msrs.iter().find(|m| m.index == msr::KERNEL_GS_BASE).map_or(0, |m| m.value)
        }
        Field::Cr0 => state.cr0,
        Field::Cr2 => state.cr2,
        Field::Cr3 => state.cr3,
        Field::Cr4 => state.cr4,
        Field::Cr8 => state.cr8,
        Field::Efer => state.efer,
    };
    out.copy_from_slice(&value.to_le_bytes()[..size]);
    size
}

/// Puts `data` at `at` of the XSAVE component `bit`, which becomes present.
fn put(area: &mut [u8], bit: u8, at: usize, data: &[u8]) -> Option<()> {
    area.get(at + data.len() - 1)?;
    let fresh = area.get(xsave::XSTATE_BV)? & bit == 0;
    if fresh {
        match bit {
            xsave::X87_BIT => {
                area.get_mut(..xsave::MXCSR)?.fill(0);
                area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
                area.get_mut(xsave::ST..xsave::XMM)?.fill(0);
            }
            xsave::SSE_BIT => {
                let mxcsr = Xsave(area).mxcsr().to_le_bytes();
                area.get_mut(xsave::MXCSR..xsave::MXCSR + 4)?.copy_from_slice(&mxcsr);
                area.get_mut(xsave::XMM..xsave::XMM + 256)?.fill(0);
            }
            _ => area.get_mut(xsave::YMM_HIGH..xsave::YMM_HIGH + 256)?.fill(0),
        }
        area[xsave::XSTATE_BV] |= bit;
    }
    area.get_mut(at..at + data.len())?.copy_from_slice(data);
    Some(())
}

fn write_fpu(area: &mut [u8], n: usize, value: u32) -> Option<()> {
    let half = &value.to_le_bytes()[..2];
    match n {
        0 => put(area, xsave::X87_BIT, 0, half),
        1 => put(area, xsave::X87_BIT, 2, half),
        2 => {
            let abridged = (0..8).filter(|p| value >> (2 * p) & 3 != 3).fold(0u8, |tags, p| tags | 1 << p);
            put(area, xsave::X87_BIT, 4, &[abridged])
        }
        3 => put(area, xsave::X87_BIT, 12, half),
        4 => put(area, xsave::X87_BIT, 8, &value.to_le_bytes()),
        5 => put(area, xsave::X87_BIT, 20, half),
        6 => put(area, xsave::X87_BIT, 16, &value.to_le_bytes()),
        _ => put(area, xsave::X87_BIT, 6, half),
    }
}

/// Sets register `number` of `state` to `data`; `None` if that is not possible: no such register, wrong
/// length, a selector (its descriptor would not be loaded) or CR8 (the local APIC's). Writing what is
/// there already is always possible.
pub(crate) fn write(state: &mut CpuState, number: usize, data: &[u8]) -> Option<()> {
    let size = size(number)?;
    let data = data.get(..size)?;
    let mut old = [0; 16];
    read(state, number, &mut old);
    if old[..size] == *data {
        return Some(());
    }
    let mut value = [0; 8];
    value[..size.min(8)].copy_from_slice(&data[..size.min(8)]);
    let value = u64::from_le_bytes(value);
    match field(number)? {
        Field::Gpr(n) => state.gpr[n] = value,
        Field::Rip => state.rip = value,
        Field::Eflags => state.rflags = state.rflags & !0xffff_ffff | value,
        Field::St(n) => put(&mut state.xsave, xsave::X87_BIT, xsave::ST + 16 * n, data)?,
        Field::Fpu(n) => write_fpu(&mut state.xsave, n, value as u32)?,
        Field::Xmm(n) => put(&mut state.xsave, xsave::SSE_BIT, xsave::XMM + 16 * n, data)?,
        Field::Mxcsr => put(&mut state.xsave, xsave::SSE_BIT, xsave::MXCSR, data)?,
        Field::YmmHigh(n) => put(&mut state.xsave, xsave::AVX_BIT, xsave::YMM_HIGH + 16 * n, data)?,
        Field::FsBase => state.segments[4].base = value,
        Field::GsBase => state.segments[5].base = value,
        Field::KernelGsBase => match state.msrs.iter_mut().find(|m| m.index == msr::KERNEL_GS_BASE) {
            Some(found) => found.value = value,
            None => state.msrs.push(Msr { index: msr::KERNEL_GS_BASE, value }),
        },
        Field::Cr0 => state.cr0 = value,
        Field::Cr2 => state.cr2 = value,
        Field::Cr3 => state.cr3 = value,
        Field::Cr4 => state.cr4 = value,
        Field::Efer => state.efer = value,
        Field::Selector(_) | Field::Cr8 => return None,
    }
    Some(())
}
