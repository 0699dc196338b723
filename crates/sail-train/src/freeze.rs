//! Which parameter is trained when, and at which rates: the plan's modules, rules and unlock points on a model.
//!
//! Pure: names in, rates out. Used by the session for its optimizer, and by estimates for a model that has no weights.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{Module, ModulePlan, Rates, RulePlan, TrainPlan};
use crate::error::{Error, Result};
use crate::schedule::Factors;
use crate::stage::{grouped, module_of};

/// The rates of one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamRates {
    /// Peak learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// The unlock point that it waits for, by its index in the plan.
    pub unlock: Option<usize>,
}

impl ParamRates {
    /// The learning rate of a step with these factors.
    pub fn lr_at(&self, factors: &Factors) -> f64 {
        self.lr * factors.of(self.unlock)
    }
}

/// Rates by full parameter name.
pub type RatesByName = BTreeMap<String, ParamRates>;

/// What a stage does with each parameter of its model.
#[derive(Clone, Debug, PartialEq)]
pub struct FreezePlan {
    /// What is trained from the start.
    first: RatesByName,
    /// What each unlock point adds.
    unlocks: Vec<RatesByName>,
    /// What each line of the plan decides about.
    table: FreezeTable,
}

/// One line of the freeze plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreezeRow {
    /// The part of the model, without what lines above have of it.
    pub part: String,
    /// The module that it belongs to.
    pub module: Module,
    /// Number of parameters.
    pub parameters: u64,
    /// Trained or frozen, and at which rate.
    pub plan: ModulePlan,
    /// The unlock point from which on, where not from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<UnlockedFrom>,
}

/// When a line of the freeze plan begins to hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnlockedFrom {
    /// Index in `train.unfreeze`.
    pub unlock: usize,
    /// In words.
    pub after: String,
}

/// The freeze plan of a stage, printed at its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FreezeTable(pub Vec<FreezeRow>);

impl FreezePlan {
    /// Decides about every parameter: `params` are full names and shapes, `blocks` how the names of each block's
    /// parameters begin.
    ///
    /// # Errors
    /// [`Error::Usage`] for a part that nothing belongs to, and an unlock point that unlocks nothing.
    pub fn new<'a>(
        params: impl IntoIterator<Item = (&'a str, &'a [i64])>,
        blocks: &[String],
        train: &TrainPlan,
    ) -> Result<Self> {
        let blocks = Blocks::new(blocks)?;
        blocks.check(train)?;
        let rows = Rows::new(train);
        let mut matched = Matched::new(train);
        let mut plan = Self {
            first: RatesByName::new(),
            unlocks: vec![RatesByName::new(); train.unfreeze.len()],
            table: rows.table,
        };
        for (name, shape) in params {
            let place = blocks.place(name)?;
            let numel = shape.iter().product::<i64>() as u64;
            let rule = matched.rule(train, name, &place);
            let decided = rule.map_or(train.get(place.module), |index| &train.rules[index].train);
            let mut row = rule.map_or(rows.module[&place.module], |index| rows.first_rule + index);
            match decided {
                ModulePlan::Train(rates) => {
                    matched.trained_from_the_start(train, name, &place);
                    plan.first.insert(name.to_owned(), place.rates(name, shape, rates, None));
                }
                ModulePlan::Frozen => {
                    if let Some(index) = matched.unlock(train, name, &place) {
                        let rates = place.rates(name, shape, &train.unfreeze[index].rates, Some(index));
                        plan.unlocks[index].insert(name.to_owned(), rates);
                        row = rows.unlocks[&(index, place.module)];
                    }
                }
            }
            plan.table.0[row].parameters += numel;
        }
        matched.check(train)?;
        if plan.first.is_empty() {
            return Err(Error::usage(
                "`train`: the rules freeze every parameter, so there is nothing to train at first",
                "unlock points come after the first step: leave something trained from the start",
            ));
        }
        // A module of which rules and unlock points have every parameter decides about nothing.
        plan.table.0.retain(|row| row.parameters > 0);
        Ok(plan)
    }

    /// What is trained from the start.
    pub fn first(&self) -> &RatesByName {
        &self.first
    }

    /// What an unlock point adds, by its index in the plan.
    pub fn unlocked_by(&self, index: usize) -> &RatesByName {
        &self.unlocks[index]
    }

    /// The rates of a parameter that is trained at some point of the stage.
    pub fn rates(&self, name: &str) -> Option<&ParamRates> {
        [&self.first].into_iter().chain(&self.unlocks).find_map(|trained| trained.get(name))
    }

    /// The learning rate of each part of the plan that is trained now, before layer-wise decay.
    pub fn lrs(&self, factors: &Factors) -> BTreeMap<String, f64> {
        let lr = |row: &FreezeRow| {
            let ModulePlan::Train(rates) = row.plan else { return None };
            let unlock = row.from.as_ref().map(|from| from.unlock);
            // The same part may have been named before, for what of it was trained then.
            let after = row.from.as_ref().map_or(String::new(), |from| format!(" after {}", from.after));
            Some((format!("{}{after}", row.part), rates.lr * factors.reached(unlock)?))
        };
        self.table.0.iter().filter_map(lr).collect()
    }

    /// What each line of the plan decides about.
    pub fn table(&self) -> &FreezeTable {
        &self.table
    }
}

/// How the names of each block's parameters begin, by module from the bottom up.
struct Blocks(BTreeMap<Module, Vec<String>>);

/// Where a parameter lies.
struct Place {
    module: Module,
    block: Option<usize>,
    /// Of the module.
    blocks: usize,
}

impl Blocks {
    fn new(prefixes: &[String]) -> Result<Self> {
        let mut blocks: BTreeMap<Module, Vec<String>> = BTreeMap::new();
        for prefix in prefixes {
            blocks.entry(module_of(prefix)?).or_default().push(prefix.clone());
        }
        Ok(Self(blocks))
    }

    fn of(&self, module: Module) -> &[String] {
        self.0.get(&module).map_or(&[], Vec::as_slice)
    }

    fn place(&self, name: &str) -> Result<Place> {
        let module = module_of(name)?;
        let blocks = self.of(module);
        let block = blocks.iter().position(|prefix| name.starts_with(prefix.as_str()));
        Ok(Place { module, block, blocks: blocks.len() })
    }

    /// Every block that the plan names is there.
    fn check(&self, train: &TrainPlan) -> Result<()> {
        let rules = train.rules.iter().enumerate().map(|(i, rule)| (format!("train.rules[{i}]"), &rule.part));
        let unlocks = train.unfreeze.iter().enumerate().flat_map(|(i, unlock)| {
            unlock.parts.iter().map(move |part| (format!("train.unfreeze[{i}]"), part))
        });
        for (path, part) in rules.chain(unlocks) {
            let blocks = self.of(part.module).len();
            if let Some(missing) = part.missing_block(blocks) {
                return Err(Error::usage(
                    format!("`{path}.match`: `{part}` names block {missing} of {blocks}"),
                    format!("blocks count from 0, so the last one is {}", blocks.saturating_sub(1)),
                ));
            }
        }
        Ok(())
    }
}

impl Place {
    fn rates(&self, name: &str, shape: &[i64], rates: &Rates, unlock: Option<usize>) -> ParamRates {
        let weight_decay = if decays(name, shape) { rates.weight_decay } else { 0.0 };
        let lr = rates.lr * rates.layer_decay.powi(self.above(name));
        ParamRates { lr, weight_decay, betas: rates.betas, unlock }
    }

    /// How many layers lie above, counting blocks and what follows them; embeddings are below the first block (Clark et
    /// al., arXiv 2003.10555; so do the fine-tuning recipes of `BEiT` and MAE).
    fn above(&self, name: &str) -> i32 {
        let layers = self.blocks as i32;
        match self.block {
            Some(block) => layers - block as i32,
            None if self.blocks > 0 && is_embedding(name) => layers + 1,
            None => 0,
        }
    }
}

/// Whether a parameter outside the blocks comes before them.
fn is_embedding(name: &str) -> bool {
    name.contains("embed") || name.contains("preprocessor") || name.contains("_token")
}

/// Norms, biases, scales and embedding tables are not decayed.
fn decays(name: &str, shape: &[i64]) -> bool {
    shape.len() >= 2
        && !name.contains("embed_tokens")
        && !name.contains("position_embedding")
        && !name.contains("pos_embed")
        && !name.contains("class_embedding")
        && !name.contains("cls_token")
        && !name.contains("mask_token")
}

/// The empty table and where its lines are.
struct Rows {
    table: FreezeTable,
    module: BTreeMap<Module, usize>,
    first_rule: usize,
    /// By unlock point and module.
    unlocks: BTreeMap<(usize, Module), usize>,
}

impl Rows {
    fn new(train: &TrainPlan) -> Self {
        let row = |part: String, module, plan, from| FreezeRow { part, module, parameters: 0, plan, from };
        let mut rows: Vec<FreezeRow> =
            train.iter().map(|(module, plan)| row(module.to_string(), module, *plan, None)).collect();
        let module = Module::ALL.into_iter().enumerate().map(|(index, module)| (module, index)).collect();
        let first_rule = rows.len();
        rows.extend(train.rules.iter().map(|rule| {
            let part = &rule.part;
            row(part.to_string(), part.module, rule.train, None)
        }));
        let mut unlocks = BTreeMap::new();
        for (index, unlock) in train.unfreeze.iter().enumerate() {
            for module in Module::ALL {
                let parts = unlock.parts.iter().filter(|part| part.module == module);
                let parts: Vec<String> = parts.map(ToString::to_string).collect();
                let from = UnlockedFrom { unlock: index, after: unlock.at.to_string() };
                unlocks.insert((index, module), rows.len());
                rows.push(row(parts.join(" "), module, ModulePlan::Train(unlock.rates), Some(from)));
            }
        }
        Self { table: FreezeTable(rows), module, first_rule, unlocks }
    }
}

/// Which parts of the plan some parameter belongs to.
struct Matched {
    rules: Vec<bool>,
    /// Of each unlock point's parts, whether it names something and whether something that was frozen.
    unlocks: Vec<Vec<(bool, bool)>>,
}

impl Matched {
    fn new(train: &TrainPlan) -> Self {
        let unlocks = train.unfreeze.iter().map(|unlock| vec![(false, false); unlock.parts.len()]);
        Self { rules: vec![false; train.rules.len()], unlocks: unlocks.collect() }
    }

    /// The first rule that names a parameter.
    fn rule(&mut self, train: &TrainPlan, name: &str, place: &Place) -> Option<usize> {
        let names = |rule: &RulePlan| rule.part.matches(name, place.module, place.block);
        let first = train.rules.iter().position(names)?;
        self.rules[first] = true;
        Some(first)
    }

    fn trained_from_the_start(&mut self, train: &TrainPlan, name: &str, place: &Place) {
        self.name(train, name, place, |_| false);
    }

    /// The first unlock point that names a frozen parameter.
    fn unlock(&mut self, train: &TrainPlan, name: &str, place: &Place) -> Option<usize> {
        let first = train
            .unfreeze
            .iter()
            .position(|unlock| unlock.parts.iter().any(|part| part.matches(name, place.module, place.block)));
        self.name(train, name, place, |index| first == Some(index));
        first
    }

    fn name(&mut self, train: &TrainPlan, name: &str, place: &Place, unlocks: impl Fn(usize) -> bool) {
        for (index, unlock) in train.unfreeze.iter().enumerate() {
            for (part, (names, frees)) in unlock.parts.iter().zip(&mut self.unlocks[index]) {
                let matches = part.matches(name, place.module, place.block);
                *names |= matches;
                *frees |= matches && unlocks(index);
            }
        }
    }

    fn check(&self, train: &TrainPlan) -> Result<()> {
        if let Some(index) = self.rules.iter().position(|matched| !matched) {
            return Err(Error::usage(
                format!(
                    "`train.rules[{index}].match`: `{}` names no parameter that no rule before it names",
                    train.rules[index].part
                ),
                "the first rule that names a parameter decides; names are those of the model's weights",
            ));
        }
        for (index, parts) in self.unlocks.iter().enumerate() {
            for (part, (names, frees)) in train.unfreeze[index].parts.iter().zip(parts) {
                let path = format!("`train.unfreeze[{index}].match`: `{part}`");
                if !names {
                    return Err(Error::usage(
                        format!("{path} names no parameter"),
                        "names are those of the model's weights",
                    ));
                }
                if !frees {
                    return Err(Error::usage(
                        format!("{path} unlocks nothing: all of it is trained before"),
                        "leave it out, or freeze that part at first by `train.rules`",
                    ));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for FreezeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|row| row.part.len()).max().unwrap_or(0).max(10);
        writeln!(
            f,
            "{:<width$} {:>14}  {:<8} {:>9} {:>13} {:>12}",
            "module", "parameters", "state", "lr", "weight decay", "layer decay"
        )?;
        for row in &self.0 {
            let (part, parameters) = (&row.part, grouped(row.parameters));
            let [state, lr, weight_decay, layer_decay] = match row.plan {
                ModulePlan::Frozen => ["frozen", "-", "-", "-"].map(str::to_owned),
                ModulePlan::Train(Rates { lr, weight_decay, layer_decay, .. }) => {
                    let numbers = [format!("{lr:.1e}"), weight_decay.to_string(), layer_decay.to_string()];
                    let [lr, weight_decay, layer_decay] = numbers;
                    ["trained".to_owned(), lr, weight_decay, layer_decay]
                }
            };
            write!(
                f,
                "{part:<width$} {parameters:>14}  {state:<8} {lr:>9} {weight_decay:>13} {layer_decay:>12}"
            )?;
            writeln!(
                f,
                "{}",
                row.from.as_ref().map_or(String::new(), |from| format!("  after {}", from.after))
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Amount, UnlockPlan};

    const RATES: Rates = Rates { lr: 1.0, weight_decay: 0.1, betas: [0.9, 0.95], layer_decay: 0.5 };
    const FROZEN: ModulePlan = ModulePlan::Frozen;

    const PARAMS: [(&str, &[i64]); 9] = [
        ("vision.embeddings.patch_embed.weight", &[4, 4]),
        ("vision.layers.0.attn.weight", &[4, 4]),
        ("vision.layers.0.norm.weight", &[4]),
        ("vision.layers.1.attn.weight", &[4, 4]),
        ("vision.layers.1.norm.weight", &[4]),
        ("vision.norm.weight", &[4]),
        ("projector.1.weight", &[4, 4]),
        ("llm.model.embed_tokens.weight", &[8, 4]),
        ("llm.model.layers.0.mlp.weight", &[4, 4]),
    ];

    fn plan(train: &TrainPlan) -> Result<FreezePlan> {
        let blocks = ["vision.layers.0.", "vision.layers.1.", "llm.model.layers.0."].map(str::to_owned);
        FreezePlan::new(PARAMS, &blocks, train)
    }

    fn rule(part: &str, train: ModulePlan) -> RulePlan {
        RulePlan { part: part.parse().unwrap(), train }
    }

    fn unlock(step: u64, parts: &[&str], lr: f64) -> UnlockPlan {
        let parts = parts.iter().map(|part| part.parse().unwrap()).collect();
        let rates = Rates { lr, ..RATES };
        UnlockPlan { at: Amount::Steps(step), parts, rates, warmup: Amount::Steps(0) }
    }

    fn lrs(trained: &RatesByName) -> Vec<(&str, f64)> {
        trained.iter().map(|(name, rates)| (name.as_str(), rates.lr)).collect()
    }

    #[test]
    fn layers_below_learn_slower_and_only_matrices_decay() {
        let plan = plan(&TrainPlan::of(ModulePlan::Train(RATES), FROZEN, FROZEN)).unwrap();
        let found: Vec<(f64, f64)> =
            plan.first().values().map(|rates| (rates.lr, rates.weight_decay)).collect();
        // In the order of their names: embeddings, both blocks, the norm above them.
        let expected = [(0.125, 0.1), (0.25, 0.1), (0.25, 0.0), (0.5, 0.1), (0.5, 0.0), (1.0, 0.0)];
        assert_eq!(found, expected);
        let llm = super::tests::plan(&TrainPlan::of(FROZEN, FROZEN, ModulePlan::Train(RATES))).unwrap();
        assert!(llm.first()["llm.model.embed_tokens.weight"].weight_decay.abs() < 1e-12);
    }

    #[test]
    fn only_matrices_and_kernels_decay() {
        assert!(decays("llm.model.layers.0.mlp.up_proj.weight", &[8, 4]));
        assert!(decays("vision.embeddings.patch_embeddings.projection.weight", &[8, 3, 14, 14]));
        assert!(!decays("projector.1.bias", &[8]));
        assert!(!decays("llm.model.embed_tokens.weight", &[8, 4]));
        assert!(!decays("vision.embeddings.position_embedding.weight", &[16, 4]));
        assert!(!decays("vision.embeddings.position_embeddings", &[1, 17, 4]));
    }

    #[test]
    fn the_first_rule_decides_and_all_is_covered() {
        let flat = ModulePlan::Train(Rates { lr: 2.0, layer_decay: 1.0, ..RATES });
        let train = TrainPlan {
            rules: vec![
                rule("vision.*norm*", flat),
                rule("vision.blocks[0..1]", FROZEN),
                rule("vision", ModulePlan::Train(RATES)),
            ],
            ..TrainPlan::of(FROZEN, flat, FROZEN)
        };
        let plan = plan(&train).unwrap();
        assert_eq!(
            lrs(plan.first()),
            [
                ("projector.1.weight", 2.0),
                ("vision.embeddings.patch_embed.weight", 0.125),
                ("vision.layers.0.norm.weight", 2.0),
                ("vision.layers.1.attn.weight", 0.5),
                ("vision.layers.1.norm.weight", 2.0),
                ("vision.norm.weight", 2.0),
            ]
        );
        let parts: Vec<(&str, u64)> =
            plan.table().0.iter().map(|row| (row.part.as_str(), row.parameters)).collect();
        // The module's own line has nothing left to decide.
        let expected = [
            ("projector", 16),
            ("llm", 48),
            ("vision.*norm*", 12),
            ("vision.blocks[0..1]", 16),
            ("vision", 32),
        ];
        assert_eq!(parts, expected);
        assert_eq!(plan.table().0.iter().map(|row| row.parameters).sum::<u64>(), 124);
    }

    #[test]
    fn an_unlock_point_has_what_is_frozen_until_then() {
        let train = TrainPlan {
            unfreeze: vec![
                unlock(3, &["vision.blocks[1..]"], 4.0),
                unlock(5, &["vision", "llm.blocks[0]"], 8.0),
            ],
            ..TrainPlan::of(FROZEN, ModulePlan::Train(RATES), FROZEN)
        };
        let plan = plan(&train).unwrap();
        assert_eq!(lrs(plan.first()), [("projector.1.weight", 1.0)]);
        assert_eq!(
            lrs(plan.unlocked_by(0)),
            [("vision.layers.1.attn.weight", 2.0), ("vision.layers.1.norm.weight", 2.0)]
        );
        let later: Vec<&String> = plan.unlocked_by(1).keys().collect();
        assert_eq!(later.len(), 5, "{later:?}");
        assert!(plan.unlocked_by(1).values().all(|rates| rates.unlock == Some(1)));
        assert!(plan.rates("vision.norm.weight").is_some_and(|rates| rates.unlock == Some(1)));
        assert_eq!(plan.rates("llm.model.embed_tokens.weight"), None);
        let text = plan.table().to_string();
        assert_eq!(text.matches("after 5 steps").count(), 2, "{text}");
        let now = BTreeMap::from([(1, crate::config::Progress::default())]);
        let schedule = crate::config::SchedulePlan {
            kind: crate::config::ScheduleKind::Constant,
            length: Amount::Steps(9),
            warmup: 0,
            decay: None,
            min_ratio: 0.0,
            ada_lrs: None,
            early_stop: None,
        };
        let factors = Factors::new(&schedule, &train, &now, crate::config::Progress::default(), 1);
        let rates: Vec<String> = plan.lrs(&factors).into_keys().collect();
        assert_eq!(rates, ["llm.blocks[0] after 5 steps", "projector", "vision after 5 steps"]);
    }

    #[test]
    fn what_names_nothing_is_refused() {
        let trained = ModulePlan::Train(RATES);
        let base = TrainPlan::of(FROZEN, trained, FROZEN);
        let rules = |rules: Vec<RulePlan>| TrainPlan { rules, ..base.clone() };
        let unfreeze = |unfreeze: Vec<UnlockPlan>| TrainPlan { unfreeze, ..base.clone() };
        for (train, said) in [
            (
                rules(vec![rule("vision.*qkv*", FROZEN)]),
                "`train.rules[0].match`: `vision.*qkv*` names no parameter",
            ),
            (rules(vec![rule("llm", trained), rule("llm.blocks[0]", FROZEN)]), "`train.rules[1].match`"),
            (rules(vec![rule("vision.blocks[0..3]", trained)]), "names block 2 of 2"),
            (unfreeze(vec![unlock(1, &["llm.blocks[1]"], 1.0)]), "names block 1 of 1"),
            (
                unfreeze(vec![unlock(1, &["llm", "vision.head*"], 1.0)]),
                "`train.unfreeze[0].match`: `vision.head*`",
            ),
            (unfreeze(vec![unlock(1, &["projector"], 1.0)]), "unlocks nothing"),
            (unfreeze(vec![unlock(1, &["llm"], 1.0), unlock(2, &["llm.blocks[0]"], 1.0)]), "unlocks nothing"),
        ] {
            let error = plan(&train).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
        assert!(FreezePlan::new([("head.weight", &[1][..])], &[], &base).is_err());
    }
}
