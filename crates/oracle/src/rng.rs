//! A small random source with a fixed sequence for each seed (splitmix64), and values that find bugs.

/// The source.
#[derive(Clone, Debug)]
pub struct Rng(u64);

const EDGES: [u64; 26] = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    31,
    32,
    63,
    64,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

const FLOATS: [f64; 14] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    0.1,
    1e300,
    -1e-300,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    2_147_483_647.5,
    -9.3e18,
    3.4e38,
];

impl Rng {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Rng {
        Rng(seed ^ 0x5dee_ce66_d1ce_4e5b)
    }

    /// Any 64 bits.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which is not zero).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any() % bound
    }

    /// True in `percent` of all calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// An integer: an edge, something near one, something small or anything.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 | 1 => self.pick(&EDGES),
            2 => self.pick(&EDGES).wrapping_neg(),
            3 => self.pick(&EDGES).wrapping_add(self.below(5)).wrapping_sub(2),
            4 => self.below(256),
            5 => self.any() >> self.below(64),
            _ => self.any(),
        }
    }

    /// Fills `out` with lanes of one kind: integers, doubles, singles, denormals or noise.
    pub fn lanes(&mut self, out: &mut [u8]) {
        let kind = self.below(8);
        for chunk in out.chunks_mut(8) {
            let value = match kind {
                0 => self.integer(),
                1 => self.double().to_bits(),
                2 | 3 => {
                    let (low, high) = (self.single(), self.single());
                    u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32
                }
                4 => self.any() & 0x800f_ffff_800f_ffff >> self.below(8), // denormals of both sizes
                5 => self.any() & 0x0101_0101_0101_0101u64.wrapping_mul(self.below(256)),
                6 => (self.below(65536) * 0x0001_0001_0001_0001).wrapping_add(self.below(7)),
                _ => self.any(),
            };
            let bytes = value.to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    /// A double: special, ordinary or any bits.
    pub fn double(&mut self) -> f64 {
        match self.below(4) {
            0 => self.pick(&FLOATS),
            1 => self.any() as i64 as f64 / (1u64 << self.below(64)) as f64,
            2 => (self.below(2000) as f64 - 1000.0) / 8.0,
            _ => f64::from_bits(self.any()),
        }
    }

    /// A single likewise.
    pub fn single(&mut self) -> f32 {
        if self.chance(25) { f32::from_bits(self.any() as u32) } else { self.double() as f32 }
    }
}
