"""Things whose ids tell what they are better than their interfaces do.

Most are of a vendor-specific class throughout. The rest show something else first: a game controller with a
loudspeaker is no sound card. None of this is a proof: a device says of itself what ids it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

ANY = -1  # all that this vendor makes

_USB: dict[str, dict[int, tuple[int, ...]]] = {
    # Keys for FIDO, and the wallets that are such keys too.
    "security-key": {
        0x0483: (0xA2AC, 0xA2CA, 0xCDAB),  # MIRKey, Solo
        0x058B: (0x022D,),  # Infineon
        0x06CB: (0x0088,),  # Kensington VeriMark
        0x096E: (0x0850, 0x0852, 0x0853, 0x0854, 0x0856, 0x0858, 0x085A, 0x085B, 0x085D, 0x0866, 0x0867, 0x0880),
        0x1050: (ANY,),  # Yubico
        0x10C4: (0x8ACF,),  # U2F Zero
        0x1209: (0x5070, 0x50B0, 0x53C1, 0xBEEE),  # Solo, Trezor
        0x18D1: (0x5026, 0x9470),  # Google Titan
        0x1A44: (0x00BB,),  # VASCO SecureClick
        0x1D50: (0x60FC,),  # OnlyKey
        0x1E0D: (0xF1AE, 0xF1D0),  # Neowave Keydo
        0x1EA8: (0xF025, 0xFC25),  # Thetis, Excelsecu
        0x1FC9: (0xF143,),  # GoTrust Idem
        0x20A0: (0x4287, 0x42B1, 0x42B2, 0x42B3, 0x42D4),  # Nitrokey, SafeKey, CanoKey
        0x24DC: (0x0101, 0x0501),  # JaCarta U2F
        0x2581: (0xF1D0,),  # Happlink
        0x2ABE: (0x1002,),  # Bluink
        0x2C97: (ANY,),  # Ledger
        0x2CCF: (0x0880,),  # HyperFIDO
        0x311F: (ANY,),  # TrustKey
        0x32A3: (0x3201,),  # GoTrust Idem
        0x349E: (ANY,),  # Token2
        0x534C: (0x0001,),  # Trezor One
    },
    "game-controller": {
        0x054C: (0x0268, 0x05C4, 0x09CC, 0x0BA0, 0x0CE6, 0x0DF2),  # DualShock 3 and 4, DualSense
        0x057E: (0x0337, 0x2006, 0x2007, 0x2009, 0x200E, 0x2017, 0x2019),  # Nintendo
    },
    "network": {
        0x0424: (0x7500, 0x7505, 0x7800, 0x7801, 0x7850, 0x9500, 0x9505, 0x9730, 0xEC00),  # SMSC, Microchip LAN
        0x0A46: (0x0268, 0x1269, 0x8515, 0x9000, 0x9601, 0x9620, 0x9621, 0x9622),  # Davicom
        0x0B95: (0x1720, 0x1780, 0x1790, 0x178A, 0x7720, 0x772A, 0x772B, 0x772D, 0x7E2B),  # ASIX
        0x0BDA: (0x8050, 0x8053, 0x8150, 0x8152, 0x8153, 0x8155, 0x8156, 0x8157),  # Realtek
        0x2ECA: (0xC101,),  # Aquantia AQC111U
        0x9710: (0x7730, 0x7830, 0x7832),  # MosChip
    },
    "serial": {
        0x0403: (ANY,),  # FTDI, and all who put its chips into things of their own
        0x067B: (0x2303, 0x2304, 0x23A3, 0x23B3, 0x23C3, 0x23D3, 0x23E3, 0x23F3),  # PL2303
        0x10C4: (0xEA60, 0xEA61, 0xEA63, 0xEA70, 0xEA71, 0xEA80),  # CP210x
        0x1A86: (0x5523, 0x7522, 0x7523),  # CH340, CH341
        0x9710: (0x7703, 0x7720, 0x7810, 0x7820, 0x7840),  # MosChip
    },
    "tuner": {
        0x048D: (0x9005, 0x9006, 0x9135, 0x9306),  # ITE
        0x0572: (0x0320, 0x6831),  # DVBSky
        0x0B48: (ANY,),  # TechnoTrend
        0x0BDA: (0x2831, 0x2832, 0x2834, 0x2837, 0x2838),  # RTL2832U
        0x14AA: (ANY,),  # WideView
        0x15A4: (0x1000, 0x1001, 0x1002, 0x1003, 0x9015, 0x9016, 0x9035),  # Afatech
        0x2013: (ANY,),  # PCTV
        0x2040: (ANY,),  # Hauppauge
        0x734C: (ANY,),  # TBS
    },
}

# Receivers: some call themselves a camera (0480), one of them a network card.
_PCI: dict[str, dict[int, tuple[int, ...]]] = {
    "tuner": {
        0x109E: (0x0350, 0x0351, 0x036E, 0x036F, 0x0370, 0x0878, 0x0879),  # Brooktree
        0x1131: (0x7130, 0x7133, 0x7134, 0x7135, 0x7146, 0x7160, 0x7162, 0x7164, 0x7231),  # Philips SAA71xx
        0x13D0: (0x2103, 0x2104, 0x2200),  # FlexCop
        0x14F1: (0x5B7A, 0x8800, 0x8801, 0x8802, 0x8804, 0x8811, 0x8852, 0x8880),  # Conexant
        0x1822: (0x4E35,),  # Mantis
        0x1ADE: (0x3038,),  # DVBSky
        0x1B55: (ANY,),  # NetUP
        0x4444: (0x0016, 0x0803),  # Internext
        0x544D: (ANY,),  # TBS
        0xDD01: (ANY,),  # Digital Devices
    },
}

# Makers of telephones and tablets that make no cameras: what speaks PTP under these ids is a telephone.
PHONE_VENDORS = frozenset(
    {
        *(0x0421, 0x0489, 0x04E8, 0x0502, 0x05AC, 0x05C6, 0x0B05, 0x0BB4, 0x0E8D, 0x0FCA, 0x0FCE, 0x1004, 0x109B),
        *(0x12D1, 0x17EF, 0x18D1, 0x1949, 0x19D2, 0x1BBB, 0x22B8, 0x22D9, 0x2717, 0x2A45, 0x2A47, 0x2A70, 0x2AE5),
        *(0x2D95, 0x2E04, 0x2E17),
    }
)

# Those whose Bluetooth adapters are of the class ff:01:01 where the standard has e0:01:01.
BLUETOOTH_VENDORS = frozenset(
    {0x0489, 0x04CA, 0x04F2, 0x050D, 0x05AC, 0x0930, 0x0A5C, 0x0B05, 0x0BB4, 0x105B, 0x13D3, 0x19FF, 0x413C}
)


def _by_ids(table: Mapping[str, Mapping[int, tuple[int, ...]]]) -> Iterator[tuple[tuple[int, int], str]]:
    for word, vendors in table.items():
        for vendor, products in vendors.items():
            for product in products:
                yield (vendor, product), word


_USB_WORDS = dict(_by_ids(_USB))
_PCI_WORDS = dict(_by_ids(_PCI))


def usb_category(vendor: int, product: int) -> str:
    """The category of a USB device that is known by its ids; '' for all others."""
    return _USB_WORDS.get((vendor, product)) or _USB_WORDS.get((vendor, ANY), "")


def pci_category(vendor: int, device: int) -> str:
    """The category of a PCI function that is known by its ids; '' for all others."""
    return _PCI_WORDS.get((vendor, device)) or _PCI_WORDS.get((vendor, ANY), "")
