//! Which bytes of its memory operand an instruction with a mask register touches.
//!
//! Elements that are masked off do not fault and are not accessed (Intel SDM vol. 2A, 2.7.6); instructions whose
//! exception type says "NF" use the whole operand.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic as M, OpKind, Register};

use crate::core::{Core, seg};

/// The bytes that the instruction at linear address `rip` touches of its operand of `size` bytes; `None`: all.
pub fn active_bytes(core: &mut Core, rip: u64, size: usize) -> Option<u64> {
    if size > 64 {
        return None;
    }
    let insn = instruction(core, rip)?;
    let (k, elements) = (insn.op_mask(), shape(&insn, size)?);
    if k == Register::None {
        return None;
    }
    let mask = core.c().mask[k.number() & 7];
    let all = u64::MAX >> (64 - size);
    match elements {
        Elements::Each(len) => {
            let one = u64::MAX >> (64 - len.min(64));
            let chosen = (0..size / len).filter(|n| mask >> n & 1 != 0);
            Some(chosen.fold(0, |bytes, n| bytes | one << (n * len)))
        }
        Elements::Repeated(len, count) => {
            let one = u64::MAX >> (64 - len.min(64));
            let parts = (size / len).max(1);
            let chosen = (0..count.min(64)).filter(|n| mask >> n & 1 != 0);
            Some(chosen.fold(0, |bytes, n| bytes | one << (n % parts * len)) & all)
        }
    }
}

fn instruction(core: &mut Core, rip: u64) -> Option<Instruction> {
    let mut bytes = [0u8; 15];
    let first = (4096 - (rip & 0xfff) as usize).min(15);
    copy(core.fetch_page(rip).ok()?.host + (rip & 0xfff) as usize, &mut bytes[..first]);
    let mut len = first;
    if first < 15
        && let Ok(next) = core.fetch_page((rip | 0xfff).wrapping_add(1))
    {
        copy(next.host, &mut bytes[first..]);
        len = 15;
    }
    let bitness = match core.is_64bit() {
        true => 64,
        false if core.sys.segments[seg::CS].big() => 32,
        false => 16,
    };
    let insn = Decoder::with_ip(bitness, &bytes[..len], rip, DecoderOptions::NONE).decode();
    (!insn.is_invalid()).then_some(insn)
}

fn copy(host: usize, out: &mut [u8]) {
    // SAFETY: callers pass an address in a RAM page and a length that stays in it.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, out.as_mut_ptr(), out.len()) };
}

/// How mask bits and memory belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elements {
    /// Bit n is element n of this many bytes.
    Each(usize),
    /// The operand is elements of this many bytes, repeated for this many mask bits.
    Repeated(usize, usize),
}

/// `None`: masked elements fault as well.
fn shape(insn: &Instruction, size: usize) -> Option<Elements> {
    let m = insn.mnemonic();
    let mut len = insn.memory_size().element_size();
    if len == 0 || is_whole(insn) {
        return None;
    }
    match m {
        // One mask bit for a group of memory elements.
        M::Vpdpbusd
        | M::Vpdpbusds
        | M::Vpdpwssd
        | M::Vpdpwssds
        | M::Vdpbf16ps
        | M::Vfmaddcsh
        | M::Vfcmaddcsh
        | M::Vfmulcsh
        | M::Vfcmulcsh
        | M::Vfmaddcph
        | M::Vfcmaddcph
        | M::Vfmulcph
        | M::Vfcmulcph => len = 4,
        M::Vpmuldq | M::Vpmuludq => len = 8,
        _ => {}
    }
    let vector = (0..insn.op_count())
        .filter(|n| insn.op_kind(*n) == OpKind::Register)
        .map(|n| insn.op_register(n).size())
        .max()
        .unwrap_or(16);
    if is_copied(m) {
        return Some(Elements::Repeated(len, vector / len));
    }
    if insn.is_broadcast() {
        return Some(Elements::Repeated(len, insn.code().op_code().memory_size().size() / len));
    }
    size.is_multiple_of(len).then_some(Elements::Each(len))
}

/// Loads that repeat their operand.
fn is_copied(m: M) -> bool {
    matches!(
        m,
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
    )
}

/// Exception types E4NF, E5NF, E6NF: elements of the result are not made of the same elements of the operand.
fn is_whole(insn: &Instruction) -> bool {
    let m = insn.mnemonic();
    match m {
        // By a count in memory, not by an immediate.
        M::Vpsllw
        | M::Vpslld
        | M::Vpsllq
        | M::Vpsrlw
        | M::Vpsrld
        | M::Vpsrlq
        | M::Vpsraw
        | M::Vpsrad
        | M::Vpsraq => insn.op2_kind() == OpKind::Memory,
        M::Vpermb
        | M::Vpermw
        | M::Vpermd
        | M::Vpermq
        | M::Vpermps
        | M::Vpermpd
        | M::Vpermilps
        | M::Vpermilpd
        | M::Vpermi2b
        | M::Vpermi2w
        | M::Vpermi2d
        | M::Vpermi2q
        | M::Vpermi2ps
        | M::Vpermi2pd
        | M::Vpermt2b
        | M::Vpermt2w
        | M::Vpermt2d
        | M::Vpermt2q
        | M::Vpermt2ps
        | M::Vpermt2pd
        | M::Vpshufb
        | M::Vpshufd
        | M::Vpshufhw
        | M::Vpshuflw
        | M::Vshufps
        | M::Vshufpd
        | M::Vshuff32x4
        | M::Vshuff64x2
        | M::Vshufi32x4
        | M::Vshufi64x2
        | M::Vpunpckhbw
        | M::Vpunpckhwd
        | M::Vpunpckhdq
        | M::Vpunpckhqdq
        | M::Vpunpcklbw
        | M::Vpunpcklwd
        | M::Vpunpckldq
        | M::Vpunpcklqdq
        | M::Vunpckhps
        | M::Vunpckhpd
        | M::Vunpcklps
        | M::Vunpcklpd
        | M::Vpackssdw
        | M::Vpacksswb
        | M::Vpackusdw
        | M::Vpackuswb
        | M::Vpalignr
        | M::Valignd
        | M::Valignq
        | M::Vdbpsadbw
        | M::Vpmaddwd
        | M::Vpmaddubsw
        | M::Vmovddup
        | M::Vmovshdup
        | M::Vmovsldup
        | M::Vpmultishiftqb
        | M::Vpconflictd
        | M::Vpconflictq
        | M::Vcvtne2ps2bf16
        | M::Vgf2p8affineqb
        | M::Vgf2p8affineinvqb
        | M::Vinsertf32x4
        | M::Vinsertf32x8
        | M::Vinsertf64x2
        | M::Vinsertf64x4
        | M::Vinserti32x4
        | M::Vinserti32x8
        | M::Vinserti64x2
        | M::Vinserti64x4
        | M::Vextractf32x4
        | M::Vextractf32x8
        | M::Vextractf64x2
        | M::Vextractf64x4
        | M::Vextracti32x4
        | M::Vextracti32x8
        | M::Vextracti64x2
        | M::Vextracti64x4
        | M::V4fmaddps
        | M::V4fnmaddps
        | M::V4fmaddss
        | M::V4fnmaddss
        | M::Vp4dpwssd
        | M::Vp4dpwssds => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Option<Elements> {
        let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(!insn.is_invalid() && insn.has_op_mask());
        shape(&insn, insn.memory_size().size())
    }

    #[test]
    fn mask_bits_and_memory() {
        // vmovdqu8 zmm0{k1}, [rax]; vmovdqu16; vmovups; vmovapd
        assert_eq!(of(&[0x62, 0xf1, 0x7f, 0x49, 0x6f, 0x00]), Some(Elements::Each(1)));
        assert_eq!(of(&[0x62, 0xf1, 0xff, 0x49, 0x6f, 0x00]), Some(Elements::Each(2)));
        assert_eq!(of(&[0x62, 0xf1, 0x7c, 0x49, 0x10, 0x00]), Some(Elements::Each(4)));
        assert_eq!(of(&[0x62, 0xf1, 0xfd, 0x49, 0x28, 0x00]), Some(Elements::Each(8)));
        // vpaddd zmm0{k1}, zmm1, [rax]{1to16}; vcvtps2pd zmm0{k1}, [rax]{1to8}
        assert_eq!(of(&[0x62, 0xf1, 0x75, 0x59, 0xfe, 0x00]), Some(Elements::Repeated(4, 16)));
        assert_eq!(of(&[0x62, 0xf1, 0x7c, 0x59, 0x5a, 0x00]), Some(Elements::Repeated(4, 8)));
        // vbroadcastf32x4 zmm0{k1}, [rax]; vpbroadcastb zmm0{k1}, [rax]
        assert_eq!(of(&[0x62, 0xf2, 0x7d, 0x49, 0x1a, 0x00]), Some(Elements::Repeated(4, 16)));
        assert_eq!(of(&[0x62, 0xf2, 0x7d, 0x49, 0x78, 0x00]), Some(Elements::Repeated(1, 64)));
        // vpmovqb [rax]{k1}, zmm0; vaddss xmm0{k1}, xmm1, [rax]; vpdpbusd zmm0{k1}, zmm1, [rax]
        assert_eq!(of(&[0x62, 0xf2, 0x7e, 0x49, 0x32, 0x00]), Some(Elements::Each(1)));
        assert_eq!(of(&[0x62, 0xf1, 0x76, 0x09, 0x58, 0x00]), Some(Elements::Each(4)));
        assert_eq!(of(&[0x62, 0xf2, 0x75, 0x49, 0x50, 0x00]), Some(Elements::Each(4)));
        // vpermd zmm0{k1}, zmm1, [rax]; vpslld zmm0{k1}, zmm1, [rax]; vpslld zmm0{k1}, [rax], 1
        assert_eq!(of(&[0x62, 0xf2, 0x75, 0x49, 0x36, 0x00]), None);
        assert_eq!(of(&[0x62, 0xf1, 0x75, 0x49, 0xf2, 0x00]), None);
        assert_eq!(of(&[0x62, 0xf1, 0x7d, 0x49, 0x72, 0x30, 0x01]), Some(Elements::Each(4)));
    }
}
