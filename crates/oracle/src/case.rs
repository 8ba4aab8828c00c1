//! [`Case`]: what runs; [`Outcome`]: what it left; how the two are shown and compared.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

/// Linear address of the data window: [`DATA_PAGES`] writable pages, a hole of one page, a read-only page.
pub const DATA: u64 = 0x2000_0000;
/// Writable pages of the window.
pub const DATA_PAGES: u64 = 4;
/// The read-only page.
pub const READ_ONLY: u64 = DATA + (DATA_PAGES + 1) * 4096;
/// Bytes of the window.
pub const WINDOW: usize = (DATA_PAGES * 4096) as usize;
/// Linear address of the code slots.
pub const CODE: u64 = 0x3140_0000;
/// Bytes of a slot.
pub const SLOT: u64 = 512;
/// Slots; every eighth one has a page boundary in its middle.
pub const SLOTS: usize = 127;
/// Bytes of code in all.
pub const CODE_BYTES: usize = 16 * 4096;
/// Selector of the segment that 32-bit cases use as FS and GS.
pub const TLS_SELECTOR: u16 = 0x63;
/// Its base.
pub const TLS_BASE: u64 = 0x0100_0000;
/// Bytes of an XSAVE image up to AVX-512.
pub const XSAVE: usize = 2752;

/// Registers before a case.
#[derive(Clone)]
pub struct State {
    /// RAX ... R15 in encoding order.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// ES, DS, FS, GS.
    pub selectors: [u16; 4],
    /// Base of FS.
    pub fs: u64,
    /// Base of GS.
    pub gs: u64,
    /// Standard-format XSAVE image.
    pub xsave: Box<[u8; XSAVE]>,
}

/// A code fragment and everything that it starts with.
#[derive(Clone)]
pub struct Case {
    /// 64, or 32 for compatibility mode.
    pub bitness: u32,
    /// Linear address of `code`.
    pub address: u64,
    /// The instructions, without what ends them.
    pub code: Vec<u8>,
    /// May leave the straight line: ends on a breakpoint instruction wherever it lands.
    pub jumps: bool,
    /// Registers.
    pub state: State,
    /// Changes to the data window: (linear address, bytes).
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Flags that the manual leaves undefined after it.
    pub undefined: u64,
    /// An x87 instruction that records itself in the x87 instruction and data pointers.
    pub x87: bool,
}

/// An exception.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Vector; 3 is how every case ends that meets no other.
    pub vector: u8,
    /// Error code, zero where there is none.
    pub error: u64,
    /// CR2 after a page fault.
    pub address: u64,
}

/// What a case left.
#[derive(Clone)]
pub struct Outcome {
    /// What ended it.
    pub fault: Fault,
    /// RIP: of the faulting instruction, or behind the breakpoint.
    pub rip: u64,
    /// Registers.
    pub state: State,
    /// The data window.
    pub window: Vec<u8>,
}

impl State {
    /// Everything zero, x87 and MXCSR as after FNINIT and reset.
    #[must_use]
    pub fn new() -> State {
        let mut xsave = Box::new([0; XSAVE]);
        xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        State { gpr: [0; 16], rflags: 0x202, selectors: [0; 4], fs: 0, gs: 0, xsave }
    }
}

impl Default for State {
    fn default() -> State {
        State::new()
    }
}

/// A null selector without its RPL: an interrupt's return to user code clears it on the way.
#[must_use]
pub fn plain_null(selector: u16) -> u16 {
    if selector < 4 { 0 } else { selector }
}

/// AT&T text of `code` at `address`, one instruction a line with its bytes.
#[must_use]
pub fn disassemble(bitness: u32, code: &[u8], address: u64) -> String {
    let mut decoder = Decoder::with_ip(bitness, code, address, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    let mut out = String::new();
    while decoder.can_decode() {
        let at = decoder.position();
        let instruction = decoder.decode();
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        let mut bytes = String::new();
        for byte in &code[at..decoder.position()] {
            let _ = write!(bytes, "{byte:02x} ");
        }
        let _ = writeln!(out, "  {:#x}: {bytes:<32} {text}   ({:?})", instruction.ip(), instruction.code());
    }
    out
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Named pieces of an XSAVE image that are compared: (name, offset, length).
fn pieces(mask: u64) -> Vec<(String, usize, usize)> {
    let mut all = vec![
        ("fcw".to_owned(), 0, 2),
        ("fsw".to_owned(), 2, 2),
        ("ftw".to_owned(), 4, 1),
        ("fop".to_owned(), 6, 2),
        ("fip".to_owned(), 8, 8),
        ("fdp".to_owned(), 16, 8),
        ("mxcsr".to_owned(), 24, 4),
    ];
    all.extend((0..8).map(|n| (format!("st{n}"), 32 + n * 16, 10)));
    all.extend((0..16).map(|n| (format!("xmm{n}"), 160 + n * 16, 16)));
    if mask & 4 != 0 {
        all.extend((0..16).map(|n| (format!("ymmh{n}"), 576 + n * 16, 16)));
    }
    all
}

/// Layout of the AVX-512 components in the host's XSAVE image: offsets of components 5, 6, 7.
pub type WideLayout = [usize; 3];

fn wide_pieces(mask: u64, layout: WideLayout) -> Vec<(String, usize, usize)> {
    if mask & 0xe0 != 0xe0 {
        return Vec::new();
    }
    let mut all: Vec<_> = (0..8).map(|n| (format!("k{n}"), layout[0] + n * 8, 8)).collect();
    all.extend((0..16).map(|n| (format!("zmmh{n}"), layout[1] + n * 32, 32)));
    all.extend((16..32).map(|n| (format!("zmm{n}"), layout[2] + (n - 16) * 64, 64)));
    all
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// XCR0 of both sides.
    pub xcr0: u64,
    /// Where the host keeps AVX-512 state.
    pub wide: WideLayout,
    /// Compare flags that the manual leaves undefined, too.
    pub undefined: bool,
}

/// Whether the outcomes of `case` agree: the quick form of [`differences`].
#[must_use]
pub fn agree(case: &Case, native: &Outcome, engine: &Outcome, scope: &Scope) -> bool {
    let ignored = if scope.undefined { 0 } else { case.undefined };
    let (a, b) = (&native.state, &engine.state);
    let plain = native.fault == engine.fault
        && native.rip == engine.rip
        && a.gpr == b.gpr
        && (a.rflags ^ b.rflags) & !ignored == 0
        && (a.fs, a.gs, a.selectors) == (b.fs, b.gs, b.selectors)
        && native.window == engine.window;
    let same = |from: usize, to: usize| a.xsave[from..to] == b.xsave[from..to];
    let vector = same(0, 5) && (case.x87 || same(6, 24)) && same(24, 28) && same(32, 416);
    let upper = scope.xcr0 & 4 == 0 || same(576, 832);
    let [k, high, more] = scope.wide;
    let wide =
        scope.xcr0 & 0xe0 != 0xe0 || same(k, k + 64) && same(high, high + 512) && same(more, more + 1024);
    plain && vector && upper && wide
}

/// Every difference between two outcomes of `case`, one line each; empty when they agree.
#[must_use]
pub fn differences(case: &Case, native: &Outcome, engine: &Outcome, scope: &Scope) -> Vec<String> {
    let mut out = Vec::new();
    let mut differ = |name: &str, before: String, left: String, right: String| {
        if left != right {
            out.push(format!("{name:>8}: before {before}  host {left}  engine {right}"));
        }
    };
    differ("fault", "-".into(), format!("{:x?}", native.fault), format!("{:x?}", engine.fault));
    let hex = |value: u64| format!("{value:#x}");
    differ("rip", hex(case.address), hex(native.rip), hex(engine.rip));
    for (n, name) in NAMES.iter().enumerate() {
        differ(name, hex(case.state.gpr[n]), hex(native.state.gpr[n]), hex(engine.state.gpr[n]));
    }
    let ignored = if scope.undefined { 0 } else { case.undefined };
    let flags = |value: u64| format!("{:#x}", value & !ignored);
    differ("rflags", hex(case.state.rflags), flags(native.state.rflags), flags(engine.state.rflags));
    let selectors = |state: &State| format!("{:x?}", state.selectors);
    differ("es..gs", selectors(&case.state), selectors(&native.state), selectors(&engine.state));
    differ("fs_base", hex(case.state.fs), hex(native.state.fs), hex(engine.state.fs));
    differ("gs_base", hex(case.state.gs), hex(native.state.gs), hex(engine.state.gs));
    let bytes =
        |from: &[u8]| from.iter().rev().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let compared = pieces(scope.xcr0).into_iter().chain(wide_pieces(scope.xcr0, scope.wide));
    for (name, at, len) in compared {
        if case.x87 && crate::rules::X87_POINTERS.contains(&name.as_str()) {
            continue;
        }
        let (left, right) = (&native.state.xsave[at..at + len], &engine.state.xsave[at..at + len]);
        if left != right {
            differ(&name, bytes(&case.state.xsave[at..at + len]), bytes(left), bytes(right));
        }
    }
    let mut memory = 0;
    for (at, (left, right)) in native.window.chunks(8).zip(engine.window.chunks(8)).enumerate() {
        if left != right && memory < 8 {
            memory += 1;
            differ(&format!("{:#x}", DATA + at as u64 * 8), "-".into(), bytes(left), bytes(right));
        }
    }
    out
}

/// The inputs of `case`, for a report.
#[must_use]
pub fn describe(case: &Case, xcr0: u64) -> String {
    let mut out = disassemble(case.bitness, &case.code, case.address);
    for (n, name) in NAMES.iter().enumerate() {
        let _ = write!(out, "  {name:>4}={:#018x}{}", case.state.gpr[n], if n % 4 == 3 { "\n" } else { "" });
    }
    let State { rflags, fs, gs, .. } = &case.state;
    let _ = writeln!(out, "  rflags={rflags:#x} fs={fs:#x} gs={gs:#x}");
    for (name, at, len) in pieces(xcr0).into_iter().take(7) {
        let text =
            case.state.xsave[at..at + len].iter().rev().fold(String::new(), |t, b| t + &format!("{b:02x}"));
        let _ = write!(out, "  {name}={text}");
    }
    let _ = writeln!(out);
    for (address, bytes) in &case.patches {
        let _ = writeln!(out, "  [{address:#x}] = {:02x?}", &bytes[..bytes.len().min(32)]);
    }
    out
}
