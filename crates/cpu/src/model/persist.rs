//! What is saved of a [`CpuModel`]: all of it, so that a guest finds the processor that it knows, wherever it wakes.

use serde::{Deserialize, Serialize};
use wardian_state::{Record, Refused};

use super::{CpuModel, Feature, FeatureSet, HostCpuid, Offer, Vendor, leaves};

/// XSAVE's leaf: where the components lie in the image.
const XSAVE_LEAF: u32 = 0xd;
const MAX_ANSWERS: usize = 256;

/// A [`CpuModel`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelState {
    /// Name and version.
    pub name: String,
    /// The vendor's twelve letters.
    pub vendor: String,
    /// Leaf 1 EAX.
    pub signature: u32,
    /// Features as `/proc/cpuinfo` names them.
    pub features: Vec<String>,
    /// Rate of the TSC in Hz.
    pub tsc_hz: u64,
    /// Width of physical addresses.
    pub physical_bits: u32,
    /// Brand string.
    #[serde(with = "wardian_state::hex")]
    pub brand: [u8; 48],
    /// Answers copied from the host that it was made on: leaf, subleaf, EAX, EBX, ECX, EDX.
    pub copied: Vec<[u32; 6]>,
}

impl Record for ModelState {
    const KIND: &'static str = "cpu-model";
    const VERSION: u16 = 1;
}

impl CpuModel {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> ModelState {
        ModelState {
            name: self.name.clone(),
            vendor: String::from_utf8_lossy(&self.vendor.letters()).into_owned(),
            signature: self.signature,
            features: self.features.iter().map(|feature| feature.name().to_owned()).collect(),
            tsc_hz: self.tsc_hz,
            physical_bits: self.physical_bits,
            brand: self.brand,
            copied: self
                .copied
                .answers()
                .map(|((leaf, sub), [a, b, c, d])| [leaf, sub, a, b, c, d])
                .collect(),
        }
    }

    /// The model that was saved as `state`, for an engine that offers `offer` on this host.
    ///
    /// # Errors
    /// Names the feature that this host or this engine does not have.
    pub fn restore(state: &ModelState, offer: &Offer) -> Result<CpuModel, Refused> {
        Self::restore_on(state, offer, &HostCpuid::read())
    }

    /// The same over given host answers.
    ///
    /// # Errors
    /// As [`CpuModel::restore`].
    pub fn restore_on(state: &ModelState, offer: &Offer, host: &HostCpuid) -> Result<CpuModel, Refused> {
        let refuse = |why: String| Refused::new::<ModelState>(why);
        let vendor = Vendor::of(state.vendor.as_bytes())
            .ok_or_else(|| refuse(format!("there is no vendor {:?}", state.vendor)))?;
        let mut features = FeatureSet::default();
        for name in &state.features {
            let feature = Feature::by_name(name)
                .filter(|feature| feature.name() == name)
                .ok_or_else(|| refuse(format!("feature '{name}' is not known")))?;
            features.set(feature, true);
        }
        if !(32..=52).contains(&state.physical_bits) || state.copied.len() > MAX_ANSWERS {
            return Err(refuse("its CPUID answers are out of range".to_owned()));
        }
        let answers = state.copied.iter().map(|[leaf, sub, a, b, c, d]| ((*leaf, *sub), [*a, *b, *c, *d]));
        let model = CpuModel {
            name: state.name.clone(),
            vendor,
            signature: state.signature,
            features,
            tsc_hz: state.tsc_hz,
            physical_bits: state.physical_bits,
            brand: state.brand,
            copied: HostCpuid::from_answers(answers),
        };
        let available = model.available(host, offer);
        if let Some(lacking) = features.iter().find(|feature| !available.has(*feature)) {
            let name = lacking.name();
            return Err(refuse(format!("feature '{name}' is not available on this host with this engine")));
        }
        let here = leaves::copied(host);
        let layout = |cpuid: &HostCpuid, sub: u32| cpuid.get(XSAVE_LEAF, sub);
        let carried = (2..20).filter(|sub| model.xcr0_mask() >> sub & 1 != 0);
        if let Some(sub) = carried.into_iter().find(|sub| layout(&model.copied, *sub) != layout(&here, *sub))
        {
            return Err(refuse(format!("this host keeps component {sub} of its state in another place")));
        }
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::{CpuModel, HostCpuid, ModelState, Offer};

    fn offer() -> Offer {
        Offer { avx512: true, tsc_hz: 2_600_000_000, ..Offer::default() }
    }

    #[test]
    fn a_model_is_the_same_again() {
        for spec in ["host", "x86-64-v2,vendor=AuthenticAMD", "host,+nonstop_tsc,-avx512f"] {
            let model = CpuModel::host(spec, &offer()).unwrap();
            let text = serde_json::to_string(&model.save()).unwrap();
            let state: ModelState = serde_json::from_str(&text).unwrap();
            assert_eq!(CpuModel::restore(&state, &offer()).unwrap(), model, "{spec}");
        }
    }

    #[test]
    fn the_feature_that_forbids_it_is_named() {
        let model = CpuModel::host("x86-64-v2", &offer()).unwrap();
        let without_sse3 = |((leaf, sub), mut answer): ((u32, u32), [u32; 4])| {
            answer[2] &= if leaf == 1 { !1 } else { !0 };
            ((leaf, sub), answer)
        };
        let bare = HostCpuid::from_answers(HostCpuid::read().answers().map(without_sse3));
        let error = CpuModel::restore_on(&model.save(), &offer(), &bare).unwrap_err().to_string();
        assert!(error.contains("feature 'pni' is not available"), "{error}");
        let mut odd = model.save();
        odd.features.push("wings".to_owned());
        assert!(CpuModel::restore(&odd, &offer()).unwrap_err().why.contains("'wings'"));
        odd = model.save();
        odd.vendor = "GenuineWard".to_owned();
        CpuModel::restore(&odd, &offer()).unwrap_err();
    }
}
