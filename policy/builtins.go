package policy

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
)

// allowedBuiltins are pure, deterministic and cheap in proportion to their
// arguments. Left out on purpose, beyond everything that reaches the outside
// (http, opa.runtime, net.lookup, clocks, randomness, schemas, which read host
// files): parsers that recurse over text a request may carry (rego, graphql,
// JSON and YAML), graph walks, expansion of a small argument to a huge result
// (bits.lsh, net.cidr_expand, numbers.range), templates, and cryptography.
var allowedBuiltins = []string{
	// comparison, arithmetic and what the compiler itself inserts
	"abs", "and", "assign", "ceil", "div", "eq", "equal", "floor", "gt", "gte", "internal.member_2",
	"internal.member_3", "internal.print", "internal.template_string", "internal.test_case", "lt", "lte",
	"minus", "mul", "neq", "or", "plus", "print", "rem", "round",
	"bits.and", "bits.negate", "bits.or", "bits.rsh", "bits.xor",
	// aggregates, arrays, sets, objects
	"array.concat", "array.flatten", "array.reverse", "array.slice", "count", "intersection", "max", "min",
	"object.filter", "object.get", "object.keys", "object.remove", "object.subset", "object.union",
	"object.union_n", "product", "sort", "sum", "union", "walk",
	// strings
	"concat", "contains", "endswith", "format_int", "glob.match", "glob.quote_meta", "indexof", "indexof_n",
	"lower", "regex.find_n", "regex.is_valid", "regex.match", "regex.replace", "regex.split", "replace",
	"split", "sprintf", "startswith", "strings.any_prefix_match", "strings.any_suffix_match",
	"strings.count", "strings.replace_n", "strings.reverse", "strings.split_n", "substring", "to_number", "trim",
	"trim_left", "trim_prefix", "trim_right", "trim_space", "trim_suffix", "upper",
	// encodings and digests
	"base64.decode", "base64.encode", "base64.is_valid", "base64url.decode", "base64url.encode",
	"base64url.encode_no_pad", "crypto.sha256", "hex.decode", "hex.encode", "json.marshal",
	"urlquery.decode", "urlquery.encode", "uuid.parse",
	// networks
	"net.cidr_contains", "net.cidr_contains_matches", "net.cidr_intersects", "net.cidr_is_valid",
	// time, always of input.now
	"time.add_date", "time.clock", "time.date", "time.diff", "time.format", "time.parse_duration_ns",
	"time.parse_ns", "time.parse_rfc3339_ns", "time.weekday",
	// types and units
	"is_array", "is_boolean", "is_null", "is_number", "is_object", "is_set", "is_string", "type_name",
	"units.parse", "units.parse_bytes",
}

// workerCapabilities are OPA's, less the built-ins that are not allowed, less
// language features that may still change, less any network.
func workerCapabilities() *ast.Capabilities {
	caps := ast.CapabilitiesForThisVersion()
	caps.Builtins = slices.DeleteFunc(slices.Clone(caps.Builtins), func(b *ast.Builtin) bool {
		return !slices.Contains(allowedBuiltins, b.Name)
	})
	caps.Features = slices.DeleteFunc(slices.Clone(caps.Features), func(f string) bool {
		return f == ast.FeatureRegoV2 || f == ast.FeatureRegoV2Import
	})
	caps.AllowNet = []string{}
	return caps
}

// forbiddenBuiltins are those that OPA has and policies may not call.
func forbiddenBuiltins() map[string]bool {
	out := map[string]bool{}
	for _, b := range ast.CapabilitiesForThisVersion().Builtins {
		if !slices.Contains(allowedBuiltins, b.Name) {
			out[b.Name] = true
		}
	}
	return out
}
