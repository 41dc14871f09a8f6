package vectors

import (
	"slices"
	"strings"
)

func (s *tokenSet) wrongClaims() {
	s.claims("duplicate-claim", "exp twice, the same", inserted(3, pair{claimExpiry, integer(expiry)}))
	s.claims("duplicate-claim-later", "exp twice, the second later", inserted(3, pair{claimExpiry, integer(expiry + 9)}))
	s.claims("unknown-claim", "nbf", inserted(3, pair{5, integer(issued)}))
	s.claims("unknown-private-claim", "", append(baseClaims(), pair{-65540, integer(1)}))
	s.refused("text-claim", "malformed", "the key is a text", newEnvelope(brokerKey, slices.Concat(
		head(majorMap, uint64(len(baseClaims())+1)), mapOf(baseClaims()...)[1:], text("x"), integer(1))).bytes())
	unsorted := baseClaims()
	unsorted[0], unsorted[1] = unsorted[1], unsorted[0]
	s.claims("unsorted-claims", "", unsorted)
	s.refused("indefinite-claims", "malformed", "", newEnvelope(brokerKey,
		slices.Concat([]byte{0xbf}, mapOf(baseClaims()...)[1:], []byte{0xff})).bytes())
	s.refused("claims-array", "malformed", "an array and not a map",
		newEnvelope(brokerKey, array(text(issuer), text(holder))).bytes())
	s.refused("claims-empty", "malformed", "the empty map", newEnvelope(brokerKey, mapOf()).bytes())
	s.refused("claims-nothing", "malformed", "no bytes", newEnvelope(brokerKey, nil).bytes())
	s.refused("claims-tagged", "malformed", "tag 61 around the claims",
		newEnvelope(brokerKey, append(head(majorTag, 61), mapOf(baseClaims()...)...)).bytes())

	for _, c := range []struct {
		name string
		key  int64
	}{
		{"issuer", claimIssuer},
		{"holder", claimHolder},
		{"issued", claimIssued},
		{"grant", claimGrant},
		{"epoch", claimEpoch},
		{"capability", claimCapability},
	} {
		s.claims("no-"+c.name, "", without(c.key))
		s.claims("null-"+c.name, "", with(c.key, []byte{0xf6}))
	}

	s.claims("null-expiry", "", with(claimExpiry, []byte{0xf6}))
	s.claims("zero-expiry", "absent is the only way to say none", with(claimExpiry, integer(0)))
	s.claims("negative-expiry", "", with(claimExpiry, integer(-1)))
	s.claims("huge-expiry", "after the year 9999", with(claimExpiry, integer(253402300800)))
	s.claims("overflowing-expiry", "2^64-1", with(claimExpiry, headWide(majorUint, 1<<64-1, 8)))
	s.claims("early-expiry", "before it was issued", with(claimExpiry, integer(issued-1)))
	s.claims("float-expiry", "", with(claimExpiry, []byte{0xfb, 0x41, 0xda, 0x13, 0xad, 0x5f, 0x00, 0x00, 0x00}))
	s.claims("text-expiry", "", with(claimExpiry, text("1750003600")))
	s.claims("tagged-expiry", "tag 1 around it", with(claimExpiry, append(head(majorTag, 1), integer(expiry)...)))
	s.claims("non-minimal-expiry", "in eight bytes", with(claimExpiry, headWide(majorUint, expiry, 8)))
	s.claims("zero-issued", "", with(claimIssued, integer(0)))
	s.claims("non-minimal-epoch", "", with(claimEpoch, headWide(majorUint, epoch, 1)))
	s.claims("negative-epoch", "", with(claimEpoch, integer(-1)))
	s.claims("empty-issuer", "", with(claimIssuer, text("")))
	s.claims("uri-issuer", "text with a colon is a URI to RFC 8392", with(claimIssuer, text("urn:x")))
	s.claims("long-issuer", "256 bytes", with(claimIssuer, text(strings.Repeat("i", 256))))
	s.claims("not-utf8-issuer", "", with(claimIssuer, []byte{0x61, 0xff}))
	s.claims("bytes-issuer", "", with(claimIssuer, byteString([]byte(issuer))))
	s.claims("chunked-issuer", "an indefinite text", with(claimIssuer, slices.Concat([]byte{0x7f}, text(issuer), []byte{0xff})))
	s.claims("upper-case-holder", "", with(claimHolder, text(strings.ToUpper(holder))))
	s.claims("urn-holder", "", with(claimHolder, text("urn:uuid:"+holder)))
	s.claims("zero-holder", "", with(claimHolder, text("00000000-0000-0000-0000-000000000000")))
	s.claims("bytes-holder", "", with(claimHolder, byteString(uuidBytes(holder))))
	s.claims("short-grant", "15 bytes", with(claimGrant, byteString(uuidBytes(grant)[:15])))
	s.claims("zero-grant", "", with(claimGrant, byteString(make([]byte, 16))))
	s.claims("text-grant", "", with(claimGrant, text(grant)))
	s.claims("zero-parent", "absent is the only way to say none", inserted(5, pair{claimParent, byteString(make([]byte, 16))}))
	s.claims("empty-parent", "", inserted(5, pair{claimParent, byteString(nil)}))
	s.claims("short-parent", "", inserted(5, pair{claimParent, byteString(uuidBytes(parent)[:15])}))
	s.claims("own-parent", "", inserted(5, pair{claimParent, byteString(uuidBytes(grant))}))
}

func (s *tokenSet) wrongCapability() {
	put := func(name, comment string, c []byte) { s.claims(name, comment, with(claimCapability, c)) }
	ok := fsResource("/photos")
	kind, resource, rights := pair{1, text("fs")}, pair{2, ok}, pair{3, texts("read")}

	put("unknown-kind", "", mapOf(pair{1, text("nuclear")}, resource, rights))
	put("reserved-provider", "", mapOf(kind, resource, rights, pair{4, byteString(uuidBytes(otherVM))}))
	put("reserved-except", "", mapOf(kind, resource, rights, pair{5, array(fsResource("/photos/private"))}))
	put("null-provider", "", mapOf(kind, resource, rights, pair{4, []byte{0xf6}}))
	put("unknown-capability-key", "", mapOf(kind, resource, rights, pair{6, integer(1)}))
	put("duplicate-capability-key", "", mapOf(kind, resource, rights, rights))
	put("no-kind", "", mapOf(resource, rights))
	put("no-resource", "", mapOf(kind, rights))
	put("no-rights", "", mapOf(kind, resource))
	put("empty-rights", "", capability(ok))
	put("write-only", "", capability(ok, "write"))
	put("unsorted-rights", "", capability(ok, "write", "read"))
	put("duplicate-rights", "", capability(ok, "read", "read"))
	put("unknown-right", "", capability(ok, "execute", "read"))
	put("many-rights", "more than any kind has", capability(ok, slices.Repeat([]string{"read"}, 65)...))
	put("resource-unknown-key", "", capability(mapOf(
		pair{1, byteString(uuidBytes(partition))}, pair{2, text("/photos")}, pair{3, integer(0)}), "read"))
	put("resource-duplicate-key", "", capability(mapOf(
		pair{1, byteString(uuidBytes(partition))}, pair{2, text("/photos")}, pair{2, text("/")}), "read"))
	put("resource-unsorted", "", capability(mapOf(
		pair{2, text("/photos")}, pair{1, byteString(uuidBytes(partition))}), "read"))
	put("resource-non-minimal", "", capability(mapOf(pair{1, byteString(uuidBytes(partition))},
		pair{2, append(headWide(majorText, 7, 1), "/photos"...)}), "read"))
	put("resource-text", "", capability(text("/photos"), "read"))
	put("resource-no-path", "", capability(mapOf(pair{1, byteString(uuidBytes(partition))}), "read"))
	put("zero-partition", "", capability(mapOf(pair{1, byteString(make([]byte, 16))}, pair{2, text("/photos")}), "read"))
	put("short-partition", "", capability(mapOf(pair{1, byteString(uuidBytes(partition)[:15])}, pair{2, text("/photos")}), "read"))
	put("text-partition", "", capability(mapOf(pair{1, text(partition)}, pair{2, text("/photos")}), "read"))
	put("path-dot-dot", "", capability(fsResource("/photos/../svc"), "read"))
	put("path-dot", "", capability(fsResource("/./photos"), "read"))
	put("path-relative", "", capability(fsResource("photos"), "read"))
	put("path-empty-component", "", capability(fsResource("/photos/"), "read"))
	put("path-nul", "", capability(fsResource("/photos\x00"), "read"))
	put("path-not-utf8", "", capability(fsResource("/\xff"), "read"))
	put("path-too-long", "4097 bytes", capability(fsResource("/a"+strings.Repeat("/"+strings.Repeat("p", 255), 16)[1:]), "read"))
	put("path-component-too-long", "256 bytes", capability(fsResource("/"+strings.Repeat("p", 256)), "read"))
	put("path-bytes", "", capability(mapOf(
		pair{1, byteString(uuidBytes(partition))}, pair{2, byteString([]byte("/photos"))}), "read"))
	put("deep-resource", "nested too deep", capability(slices.Concat(slices.Repeat([]byte{0x81}, 24), integer(0)), "read"))
}

// wrongAuthority is well formed: only who signed it, for whom, and when, is
// wrong.
func (s *tokenSet) wrongAuthority() {
	payload := mapOf(baseClaims()...)
	base := newEnvelope(brokerKey, payload)

	s.refused("other-key", "unknown_key", "another broker's", newEnvelope(otherKey, payload).bytes())
	e := base
	e.key = otherKey
	s.refused("stolen-kid", "signature", "another key's signature under this key's id", e.bytes())
	e = base
	e.aad = []byte("spectrum-capability-token/v2")
	s.refused("other-aad", "signature", "", e.bytes())
	e.aad = nil
	s.refused("no-aad", "signature", "signed with an empty external AAD", e.bytes())

	parts := base.parts()
	swapped := func(i int, part []byte) []byte {
		p := slices.Clone(parts)
		p[i] = part
		return append(head(majorTag, 18), array(p...)...)
	}
	s.refused("swapped-claims", "signature", "the claims are another token's",
		swapped(2, byteString(mapOf(with(claimCapability, capability(fsResource("/"), "read", "write"))...))))
	s.refused("zero-signature", "signature", "", swapped(3, byteString(make([]byte, 64))))

	s.refused("expired", "expired", "a second ago",
		newEnvelope(brokerKey, mapOf(with(claimExpiry, integer(now-1))...)).bytes())
	s.refused("expires-now", "expired", "at its expiry a token is over",
		newEnvelope(brokerKey, mapOf(with(claimExpiry, integer(now))...)).bytes())
	s.refused("other-issuer", "issuer", "",
		newEnvelope(brokerKey, mapOf(with(claimIssuer, text("elsewhere"))...)).bytes())
	s.refused("earlier-epoch", "epoch", "",
		newEnvelope(brokerKey, mapOf(with(claimEpoch, integer(epoch-1))...)).bytes())
	s.refused("later-epoch", "epoch", "",
		newEnvelope(brokerKey, mapOf(with(claimEpoch, integer(epoch+1))...)).bytes())
	s.refused("other-holder", "holder", "a good token, presented by another VM", base.bytes())
	s.vectors[len(s.vectors)-1].By = otherVM
}
