//! What is compared and what is not, each with its reason.

use iced_x86::{
    Code, CodeSize, CpuidFeature as C, Decoder, DecoderOptions, EncodingKind, Instruction, MemorySize,
    Mnemonic as M, Register,
};
use wardian_cpu::bits::rflags;
use wardian_cpu::{CpuModel, Feature as F};

use crate::case::{Case, Outcome};

/// Parts of the x87 image that are not compared after an x87 instruction that records itself: a translator runs the
/// instruction at another address, and no operating system or program relies on them.
pub const X87_POINTERS: [&str; 3] = ["fop", "fip", "fdp"];

/// Instructions that are left out, with the reason.
pub const EXCLUDED: &[(&str, &[M])] = &[
    ("answers by the processor model, not by the host", &[M::Cpuid, M::Xgetbv]),
    ("a different value each time", &[M::Rdtsc, M::Rdtscp, M::Rdrand, M::Rdseed, M::Rdpid, M::Rdpmc]),
    (
        "the host's kernel emulates it (UMIP), the guest's does not",
        &[M::Sgdt, M::Sidt, M::Sldt, M::Str, M::Smsw],
    ),
    ("depends on the descriptor tables; tested by guests", &[M::Lar, M::Lsl, M::Verr, M::Verw]),
    (
        "enters the host's kernel; tested by guests",
        &[M::Syscall, M::Sysenter, M::Int, M::Int3, M::Int1, M::Into, M::Vmcall, M::Vmmcall, M::Vmgexit],
    ),
    (
        "loads or leaves a code segment; tested by guests",
        &[M::Iret, M::Iretd, M::Iretq, M::Retf, M::Jmpe, M::Sysexit, M::Sysexitq, M::Sysret, M::Sysretq],
    ),
    ("goes to where the host's kernel may have something", &[M::Xabort, M::Xbegin, M::Xend, M::Xtest]),
    (
        "no data-sized result: MPX is not offered",
        &[M::Bndcl, M::Bndcn, M::Bndcu, M::Bndldx, M::Bndmk, M::Bndmov, M::Bndstx],
    ),
    (
        "stores what the host tracks of its own state use (XINUSE)",
        &[M::Xsavec, M::Xsavec64, M::Xsaveopt, M::Xsaveopt64],
    ),
    ("privileged and dangerous to try outside a guest", &[M::Rsm, M::Getsec, M::Encls, M::Enclu, M::Enclv]),
];

fn features(wanted: C) -> Option<&'static [F]> {
    Some(match wanted {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::X64
        | C::CPUID
        | C::MULTIBYTENOP
        | C::PAUSE
        | C::MSR
        | C::TSC
        | C::RDPMC
        | C::SEP
        | C::CET_IBT
        | C::SMAP
        | C::INVPCID
        | C::SYSCALL => &[],
        C::FPU | C::FPU287 | C::FPU387 => &[F::Fpu],
        C::CX8 => &[F::Cx8],
        C::CMOV => &[F::Cmov],
        C::MMX => &[F::Mmx],
        C::FXSR => &[F::Fxsr],
        C::SSE => &[F::Sse],
        C::SSE2 => &[F::Sse2],
        C::SSE3 => &[F::Sse3],
        C::SSSE3 => &[F::Ssse3],
        C::SSE4_1 => &[F::Sse41],
        C::SSE4_2 => &[F::Sse42],
        C::SSE4A => &[F::Sse4a],
        C::ADX => &[F::Adx],
        C::AES => &[F::Aes],
        C::AVX => &[F::Avx],
        C::AVX2 => &[F::Avx2],
        C::FMA => &[F::Fma],
        C::F16C => &[F::F16c],
        C::BMI1 => &[F::Bmi1],
        C::BMI2 => &[F::Bmi2],
        C::LZCNT => &[F::Abm],
        C::POPCNT => &[F::Popcnt],
        C::MOVBE => &[F::Movbe],
        C::PCLMULQDQ => &[F::Pclmulqdq],
        C::VPCLMULQDQ => &[F::Vpclmulqdq],
        C::VAES => &[F::Vaes],
        C::GFNI => &[F::Gfni],
        C::SHA => &[F::ShaNi],
        C::SHA512 => &[F::Sha512],
        C::SM3 => &[F::Sm3],
        C::SM4 => &[F::Sm4],
        C::CLFSH => &[F::Clflush],
        C::CLFLUSHOPT => &[F::Clflushopt],
        C::CLWB => &[F::Clwb],
        C::CMPXCHG16B => &[F::Cx16],
        C::FSGSBASE => &[F::Fsgsbase],
        C::PREFETCHW => &[F::Prefetchw],
        C::SERIALIZE => &[F::Serialize],
        C::XSAVE => &[F::Xsave],
        C::AVX_VNNI => &[F::AvxVnni],
        C::AVX_IFMA => &[F::AvxIfma],
        C::AVX_NE_CONVERT => &[F::AvxNeConvert],
        C::AVX_VNNI_INT8 => &[F::AvxVnniInt8],
        C::AVX_VNNI_INT16 => &[F::AvxVnniInt16],
        C::AVX512F => &[F::Avx512f],
        C::AVX512BW => &[F::Avx512bw],
        C::AVX512CD => &[F::Avx512cd],
        C::AVX512DQ => &[F::Avx512dq],
        C::AVX512VL => &[F::Avx512vl],
        C::AVX512_IFMA => &[F::Avx512ifma],
        C::AVX512_VBMI => &[F::Avx512vbmi],
        C::AVX512_VBMI2 => &[F::Avx512vbmi2],
        C::AVX512_VNNI => &[F::Avx512vnni],
        C::AVX512_BITALG => &[F::Avx512bitalg],
        C::AVX512_BF16 => &[F::Avx512bf16],
        C::AVX512_FP16 => &[F::Avx512fp16],
        C::AVX512_VPOPCNTDQ => &[F::Avx512vpopcntdq],
        C::AVX512_VP2INTERSECT => &[F::Avx512vp2intersect],
        _ => return None,
    })
}

/// Why `code` is left out, if it is.
#[must_use]
pub fn excluded(code: Code) -> Option<&'static str> {
    let mnemonic = code.mnemonic();
    let by_name = EXCLUDED.iter().find(|(_, list)| list.contains(&mnemonic)).map(|(reason, _)| *reason);
    by_name
        .or_else(|| {
            (code.is_jmp_far()
                || code.is_call_far()
                || code.is_jmp_far_indirect()
                || code.is_call_far_indirect())
            .then_some("loads or leaves a code segment; tested by guests")
        })
        .or_else(|| {
            matches!(
                code,
                Code::Pushd_ES
                    | Code::Pushd_CS
                    | Code::Pushd_SS
                    | Code::Pushd_DS
                    | Code::Pushd_FS
                    | Code::Pushd_GS
            )
            .then_some("stores 16 or 32 bits, as the processor likes (SDM, PUSH)")
        })
}

/// The encodings that are tried for a guest of `model` in `bitness`-bit code.
#[must_use]
pub fn codes(model: &CpuModel, bitness: u32) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let encoding =
                matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX);
            let carried = code
                .cpuid_features()
                .iter()
                .all(|feature| features(*feature).is_some_and(|list| list.iter().all(|f| model.has(*f))));
            info.is_instruction()
                && info.is_available_in_mode(bitness)
                && info.decoder_option() == DecoderOptions::NONE
                && (if bitness == 64 { info.intel_decoder64() } else { info.intel_decoder32() })
                && !info.fwait()
                && encoding
                && carried
                && excluded(*code).is_none()
        })
        .collect()
}

/// Why the native outcome cannot be compared with any guest's, if so.
#[must_use]
pub fn meaningless(native: &Outcome) -> Option<&'static str> {
    let high = native.fault.address as i64 >> 47;
    (native.fault.vector == 14 && high != 0 && high != -1)
        .then_some("the host has 57-bit linear addresses, the guest 48-bit ones")
}

/// Differences that are excused: (reason, test and removal). The removal makes the two outcomes equal where the excuse
/// holds and leaves every other difference in place.
type Excuse = (&'static str, fn(&Instruction, &Outcome, &Outcome) -> bool, fn(&Outcome, &mut Outcome));

/// Known exceptions, each with its reason.
const EXCUSES: &[Excuse] = &[
    (
        "the host's kernel is mapped in the upper half, the guest's is not: P of the error code",
        |_, host, engine| {
            host.fault.vector == 14
                && (host.fault.address as i64) < 0
                && host.fault.error & 1 == 1
                && engine.fault.error == host.fault.error & !1
        },
        |host, engine| engine.fault.error = host.fault.error,
    ),
    (
        "an access of several parts: which of its bytes CR2 names differs between processors",
        |instruction, host, engine| {
            let both = host.fault.vector == 14 && engine.fault.vector == 14;
            let parts = many_parts(instruction) || instruction.has_op_mask();
            both && parts && host.fault.address.abs_diff(engine.fault.address) < 1024
        },
        |host, engine| {
            engine.fault.address = host.fault.address;
            // Another page may differ in whether it is mapped at all.
            engine.fault.error = engine.fault.error & !1 | host.fault.error & 1;
        },
    ),
    (
        "an alignment check (AC at CPL 3) of an instruction that the engine emulates; no system turns them on",
        |_, host, engine| {
            let either = host.fault.vector == 17 || engine.fault.vector == 17;
            host.state.rflags & rflags::AC != 0
                && either
                && (host.fault, host.rip) != (engine.fault, engine.rip)
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "two exceptions at once, misalignment and a page fault or a non-canonical stack: which comes first",
        |_, host, engine| {
            host.fault.vector == 13 && matches!(engine.fault.vector, 12 | 14) && host.rip == engine.rip
        },
        |host, engine| engine.fault = host.fault,
    ),
    (
        "two exceptions at once, a pending or own floating-point exception and a page fault: which comes first",
        |instruction, host, engine| {
            let own =
                matches!(host.fault.vector, 16 | 19) || host.fault.vector == 3 && stores_x87(instruction);
            own && matches!(engine.fault.vector, 12..=14) && host.rip.wrapping_sub(engine.rip) < 16
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "CMPS whose operands both fault: which is read first",
        |instruction, host, engine| {
            let both = host.fault.vector == 14 && engine.fault.vector == 14;
            both && matches!(instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
        },
        |host, engine| engine.fault.address = host.fault.address,
    ),
    (
        "MASKMOV without any mask bit: whether the address is checked (SDM: as the processor likes)",
        |instruction, host, engine| {
            let kind = matches!(instruction.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu);
            kind && matches!(host.fault.vector, 12..=14) && engine.fault.vector == 3
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "cache-line hints at addresses without memory: the engine does nothing",
        |instruction, host, engine| {
            let hint = matches!(instruction.mnemonic(), M::Clflush | M::Clflushopt | M::Clwb);
            hint && matches!(host.fault.vector, 12..=14) && engine.fault.vector == 3
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "ENTER that faults: which of the pushes below the stack pointer were stored before",
        |instruction, host, _| {
            instruction.mnemonic() == M::Enter && matches!(host.fault.vector, 12 | 14 | 17)
        },
        |host, engine| {
            engine.window.clone_from(&host.window);
            engine.fault.address = host.fault.address;
        },
    ),
    (
        "XSAVE and XRSTOR: whether parts of the image that are not asked for are touched",
        |instruction, host, engine| {
            let kind = matches!(instruction.mnemonic(), M::Xsave | M::Xsave64 | M::Xrstor | M::Xrstor64);
            kind && host.fault.vector == 3 && matches!(engine.fault.vector, 12..=14)
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "an MMX instruction that faults: whether it has turned the x87 stack into MMX registers before",
        |instruction, host, engine| {
            let mmx = (0..instruction.op_count()).any(|n| instruction.op_register(n).is_mm());
            mmx && matches!(host.fault.vector, 12..=17) && host.fault == engine.fault
        },
        |host, engine| {
            engine.state.xsave[0..24].copy_from_slice(&host.state.xsave[0..24]);
            engine.state.xsave[32..160].copy_from_slice(&host.state.xsave[32..160]);
        },
    ),
    (
        "VCVTPS2PH to memory that faults: whether MXCSR has its exception flags already",
        |instruction, host, engine| {
            instruction.mnemonic() == M::Vcvtps2ph
                && matches!(host.fault.vector, 12..=14)
                && host.fault == engine.fault
        },
        |host, engine| engine.state.xsave[24..28].copy_from_slice(&host.state.xsave[24..28]),
    ),
    (
        "the guest's own tables are mapped at 10000h, nothing is on the host: P of the error code",
        |_, host, engine| {
            let there = (0x10000..0x20000).contains(&host.fault.address);
            there && host.fault.vector == 14 && engine.fault.error == host.fault.error | 1
        },
        |host, engine| engine.fault.error = host.fault.error,
    ),
    (
        "the host's frame and trampoline are mapped, nothing is there in the guest",
        |_, _, engine| engine.fault.vector == 14 && crate::native::is_own(engine.fault.address),
        |host, engine| *engine = host.clone(),
    ),
    (
        "an 80-bit store that faults on its second page: whether the bytes on the first are stored before",
        |instruction, host, engine| {
            let wide = matches!(instruction.memory_size(), MemorySize::Float80 | MemorySize::Bcd);
            wide && host.fault.vector == 14 && host.fault == engine.fault
        },
        |host, engine| engine.window.clone_from(&host.window),
    ),
    (
        "BOUND whose lower bound is exceeded: whether the upper one is read",
        |instruction, host, engine| {
            instruction.mnemonic() == M::Bound && host.fault.vector == 5 && engine.fault.vector == 14
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "a store through CS in 32-bit code: types of flat segments are not checked",
        |instruction, host, engine| {
            instruction.code_size() == CodeSize::Code32
                && instruction.memory_segment() == Register::CS
                && host.fault.vector == 13
                && engine.fault.vector == 3
        },
        |host, engine| *engine = host.clone(),
    ),
    (
        "flags at an exception that the code overwrites before it reads them",
        |_, host, engine| {
            let differ = host.state.rflags ^ engine.state.rflags;
            host.fault.vector != 3
                && host.fault == engine.fault
                && differ != 0
                && differ & !rflags::ARITH == 0
        },
        |host, engine| engine.state.rflags = host.state.rflags,
    ),
];

fn zeroes_vectors(case: &Case) -> bool {
    Decoder::with_ip(case.bitness, &case.code, case.address, DecoderOptions::NONE)
        .iter()
        .any(|instruction| matches!(instruction.mnemonic(), M::Vzeroall | M::Vzeroupper))
}

/// A gather that faults leaves its mask and destination half done; the bits above their elements, which completion
/// clears, are cleared at once or at the end.
fn gather_above(instruction: &Instruction, host: &Outcome, engine: &mut Outcome) -> bool {
    let (name, bytes) = (instruction.mnemonic(), instruction.op0_register().size());
    let used = match name {
        M::Vgatherqps | M::Vpgatherqd => instruction.memory_index().size() / 2,
        M::Vgatherdps | M::Vgatherdpd | M::Vgatherqpd | M::Vpgatherdd | M::Vpgatherdq | M::Vpgatherqq => {
            bytes
        }
        _ => return false,
    };
    if !matches!(host.fault.vector, 12..=14) || host.fault != engine.fault {
        return false;
    }
    for register in [instruction.op0_register(), instruction.op2_register()] {
        let n = register.number();
        if n >= 16 || !register.is_vector_register() {
            continue;
        }
        for (from, len) in
            [(160 + n * 16 + used.min(16), 16 - used.min(16)), (576 + n * 16, if used > 16 { 0 } else { 16 })]
        {
            engine.state.xsave[from..from + len].copy_from_slice(&host.state.xsave[from..from + len]);
        }
    }
    true
}

/// An x87 store, which an unmasked exception of its own makes void.
fn stores_x87(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
}

fn many_parts(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xrstor
            | M::Xrstor64
            | M::Fnstenv
            | M::Fnsave
            | M::Fldenv
            | M::Frstor
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vpmovdb
            | M::Vpmovdw
            | M::Vpmovqb
            | M::Vpmovqd
            | M::Vpmovqw
            | M::Vpmovwb
            | M::Vpmovsdb
            | M::Vpmovsdw
            | M::Vpmovsqb
            | M::Vpmovsqd
            | M::Vpmovsqw
            | M::Vpmovswb
            | M::Vpmovusdb
            | M::Vpmovusdw
            | M::Vpmovusqb
            | M::Vpmovusqd
            | M::Vpmovusqw
            | M::Vpmovuswb
    )
}

/// Makes `engine` equal to `host` where a known exception excuses the difference; its reason if it changed anything.
pub fn excuse(case: &Case, host: &Outcome, engine: &mut Outcome) -> Option<&'static str> {
    let mut reason = None;
    if case.bitness == 32 && zeroes_vectors(case) {
        for from in [160 + 8 * 16, 576 + 8 * 16] {
            engine.state.xsave[from..from + 128].copy_from_slice(&host.state.xsave[from..from + 128]);
        }
        // Their upper halves of 256 bits: component 6.
        let high = core::arch::x86_64::__cpuid_count(0xd, 6).ebx as usize + 8 * 32;
        if let (Some(to), Some(from)) =
            (engine.state.xsave.get_mut(high..high + 256), host.state.xsave.get(high..high + 256))
        {
            to.copy_from_slice(from);
        }
        reason =
            Some("VZEROALL and VZEROUPPER in 32-bit code clear registers 8-15, which it cannot see, too");
    }
    // Where the two part: the instruction at which one of them met an exception.
    let at = [host.rip, engine.rip]
        .into_iter()
        .filter_map(|rip| rip.checked_sub(case.address))
        .filter(|at| *at < case.code.len() as u64)
        .min();
    let Some(at) = at else { return reason };
    let at = at as usize;
    let ip = case.address + at as u64;
    let mut decoder = Decoder::with_ip(case.bitness, &case.code[at..], ip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    for (why, applies, remove) in EXCUSES {
        if applies(&instruction, host, engine) {
            remove(host, engine);
            reason = Some(*why);
        }
    }
    if gather_above(&instruction, host, engine) {
        reason = Some("a gather that faults: the bits of mask and destination above their elements");
    }
    reason
}
