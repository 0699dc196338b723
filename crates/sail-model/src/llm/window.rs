//! The keys by which Qwen's families say which layers see a sliding window only.
//!
//! No window is built: what asks for one is refused. Called by `qwen2` and `qwen3`.

use serde::{Deserialize, Serialize};

use crate::keys::Refusal;

/// Keys of `Qwen2Config` and `Qwen3Config` about sliding windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::struct_field_names, reason = "the fields are those of the published config.json")]
pub(super) struct Window {
    /// Without it there is no window.
    pub(super) use_sliding_window: bool,
    /// Rows that are seen.
    pub(super) sliding_window: Option<i64>,
    /// The first layer with a window.
    pub(super) max_window_layers: i64,
    /// Kind of attention of each layer, before all other keys; only `full_attention` is built.
    pub(super) layer_types: Option<Vec<String>>,
}

impl Window {
    /// Refuses what gives one of `layers` layers a window.
    pub(super) fn check(&self, layers: i64) -> Result<(), Refusal> {
        if let Some(types) = &self.layer_types {
            if types.iter().any(|kind| kind != "full_attention") {
                return Err(("layer_types", "only `full_attention` is supported".into()));
            }
            return Ok(());
        }
        let windows = self.use_sliding_window && self.sliding_window.is_some();
        if windows && self.max_window_layers < layers {
            let reason = format!(
                "sliding windows are not supported, and layers {} to {} have one",
                self.max_window_layers.max(0),
                layers - 1
            );
            return Err(("use_sliding_window", reason));
        }
        Ok(())
    }
}
